"""Settings of what judges an encoder: evaluation and sweeps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.settings import Positive, Section


class Evaluate(Section):
    """What the encoder is worth: linear probe, kNN and RankMe on frozen features."""

    batch: Positive = Field(256, description="images in a forward pass")
    max_images: Positive = Field(50_000, description="train images that probes are fitted to, at most")
    probe_strengths: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.1, 1.0, 10.0), min_length=1, description="inverse regularisations tried on a held-out part of train"
    )
    knn_k: Positive = Field(20, description="neighbours of the kNN classifier")


class Tune(Section):
    """A sweep: each trial is a short pretraining with some settings changed, judged by a frozen-feature measure."""

    space: str = Field("level_weights", description="file of tune_spaces/, by name or path")
    trials: Positive = Field(8, description="number of trials")
    search: Literal["optuna", "random"] = Field("optuna", description="how the next trial is chosen")
    epochs: float = Field(5, gt=0, description="epochs of a trial")
    max_images: Positive = Field(10_000, description="train images a trial's probe is fitted to, at most")
    concurrent: Positive | None = Field(None, description="trials at once; null: one for each free CPU or GPU")
