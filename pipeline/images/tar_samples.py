"""Samples in tar files: which member is the image, which ones are labels, masks or something else."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from pipeline.images.columns import LABEL_NAMES
from pipeline.images.decode import SUFFIXES
from pipeline.images.names import MASK_SUFFIXES, PHOTO_SUFFIXES, is_annotation

DOTS = "in WebDataset a key ends at the first dot"


@dataclass(frozen=True)
class Member:
    """A file in a tar file."""

    name: str
    offset: int  # of the data, bytes
    size: int
    problem: str = ""  # why it cannot be read
    text: str | None = None  # content of a label

    @property
    def key(self) -> str:
        """The key of the sample that it belongs to."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    @property
    def extension(self) -> str:
        """What follows the key and its dot, in lower case."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()

    @property
    def kind(self) -> str:
        """The kind of file that it is, by its suffix."""
        suffix = os.path.splitext(self.name)[1].lower()
        return f"{suffix} files" if suffix else "files without a suffix"


def choose_image(sample: list[Member], asked: str | None) -> tuple[Member | None, list[Member], list[Member]]:
    """The image of a sample among its members, or None.

    Args:
        sample: All members.
        asked: The extension to use; None for any image, preferably without further dots. Masks are no images, by their
            extension (seg.png) or as PNG files beside a JPEG.

    Returns:
        The image, the masks beside it, and other images that the sample has.
    """
    images = [member for member in sample if _is_image(member, asked)]
    if asked is not None or len(images) < 2:
        return next(iter(images), None), [], images[1:]
    named = [member for member in images if is_annotation(member.extension.rpartition(".")[0], ())]
    pool = [member for member in images if member not in named] or images
    pool = [member for member in pool if "." not in member.extension] or pool
    photos = [member for member in pool if f".{member.extension}" in PHOTO_SUFFIXES]
    chosen = (photos or pool)[0]
    twins = [member for member in pool if photos and f".{member.extension}" in MASK_SUFFIXES]
    masks = [member for member in images if member is not chosen and (member in named or member in twins)]
    return chosen, masks, [member for member in images if member is not chosen and member not in masks]


def json_label(text: str, key: str | None) -> str | None:
    """The label in a JSON member: the value of `key`, of a usual name, or the only value that there is."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if isinstance(content, dict):
        wanted = (key,) if key else LABEL_NAMES
        of = {str(name).strip().casefold(): value for name, value in content.items()}
        given = [of[name.casefold()] for name in wanted if name.casefold() in of]
        content = given[0] if given else next(iter(of.values())) if len(of) == 1 and not key else None
    if content is None or isinstance(content, bool):
        return None if content is None else str(content)
    return content if isinstance(content, str) else json.dumps(content)


def another(member: Member) -> str:
    """Why an image is not the one of its sample."""
    if "." in member.extension:
        return (
            f"another image of the same sample: {DOTS}, here '{shown_name(member.key)}', so other dots are not allowed in "
            "names; rename the members, or set data.image_column to the extension to use"
        )
    return "another image of the same sample; set data.image_column to the extension to use"


def _is_image(member: Member, image: str | None) -> bool:
    if image is not None:
        return member.extension == image
    return f".{member.extension.rpartition('.')[2]}" in SUFFIXES


def shown_name(name: str) -> str:
    """The name of a member as text: bytes that are not UTF-8 as ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
