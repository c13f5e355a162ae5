"""The encoders that are compared with each other, and how tables name them."""

from __future__ import annotations

from pipeline.models.encoder_source import EncoderSource

TITLES = {"trained": "trained encoder", "untrained": "same encoder, untrained", "pixels": "raw pixels (32×32)"}


def titles_of(subject: EncoderSource, *, pixels: bool = False) -> dict[str, str]:
    """Titles of the trained and the untrained encoder, and of raw pixels where they are compared too."""
    titles = {name: title for name, title in TITLES.items() if pixels or name != "pixels"}
    if subject.kind != "checkpoint":
        titles["trained"] = subject.source
    if subject.starts_pretrained:
        titles["untrained"] = "same encoder, before pretraining"
    return titles
