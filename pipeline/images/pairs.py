"""Images and their masks: which belong together, and one such pair → pixels and classes. No Ray in here."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.errors import SettingError
from pipeline.images.arrays import NPY_MAGIC, Pixels, RejectedImage, middle_square, npy_samples, tiff_samples
from pipeline.images.decode import ORIENTATION_TAG, SUFFIXES, decode_image
from pipeline.images.folders import TRAIN_FOLDERS, VAL_FOLDERS
from pipeline.storage.folder import Folder
from wavemim.evaluation.probes import held_out

MASK_SUFFIX = ".png"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_BITS, _PNG_COLOUR = 24, 25  # places in a PNG's header
_GREY, _PALETTE = 0, 3  # of PNG


@dataclass(frozen=True)
class Pair:
    """An image and its mask, by their paths relative to the two folders."""

    image: str
    mask: str


@dataclass
class Pairs:
    """What two folders hold: every input is in one of the splits, or among the rejects, or left out."""

    splits: dict[str, list[Pair]]  # train and val
    rejects: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    left_out: int = 0  # pairs beyond the number wanted
    words: str = ""  # what the folders were taken for

    @property
    def inputs(self) -> int:
        """Pairs, and files that belong to none."""
        return sum(map(len, self.splits.values())) + len(self.rejects) + self.left_out

    def digest(self, images: Folder, masks: Folder) -> str:
        """Of the names of all that is used, in which split, and of local files' sizes and times: masks are mended."""
        lines = (
            f"{split}\0{pair.image}\0{_version(images, pair.image)}\0{pair.mask}\0{_version(masks, pair.mask)}"
            for split, pairs in self.splits.items()
            for pair in pairs
        )
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _version(folder: Folder, path: str) -> str:
    if folder.local is None:
        return ""
    try:
        found = os.stat(folder.local / path)
    except OSError:  # gone: reading says so
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def find_pairs(
    images: str,
    masks: str,
    *,
    image_ending: str = "",
    mask_ending: str = "",
    val_share: float = 0.2,
    max_images: int | None = None,
    seed: int = 0,
) -> Pairs:
    """Images and masks of the same relative path without suffix (and without the endings). Raises SettingError.

    ``train/…`` (or training) in both folders, and a val folder (val, valid, validation, test: the first in both), are
    the splits; otherwise a share drawn by `seed` is held out. Of each split at most `max_images` are kept, also by
    `seed`. A pure function of the names.
    """
    image_folder, mask_folder = _folders(images, masks)
    files = _listing(image_folder, "images"), _listing(mask_folder, "masks")
    roots = _roots(*files)
    found = Pairs({"train": [], "val": []})
    for split, (image_root, mask_root) in roots.items():
        image_at = _keyed(files[0], image_root, image_ending, SUFFIXES, "an image", found.rejects)
        mask_at = _keyed(files[1], mask_root, mask_ending, {MASK_SUFFIX}, "a PNG mask", found.rejects)
        _pair(found, split, image_at, mask_at)
    if not found.splits["train"]:
        raise SettingError(_nothing_paired(images, masks, found))
    if "val" in roots and not found.splits["val"]:
        raise SettingError(
            f"segment.masks={masks}: no image of {roots['val'][0]}/ has a mask; see to val, or take it away"
        )
    if "val" not in roots:
        _hold_out(found, val_share, seed)
    train = f"{roots['train'][0]}/" if roots["train"][0] else "one folder"
    found.words = f"{train} and {roots['val'][0]}/" if "val" in roots else f"{train}, val held out"
    if max_images is not None:
        for split, pairs in found.splits.items():
            kept = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:max_images])
            found.left_out += len(pairs) - len(kept)
            found.splits[split] = [pairs[i] for i in kept]
    return found


def _folders(images: str, masks: str) -> tuple[Folder, Folder]:
    folders = []
    for key, place in (("images", images), ("masks", masks)):
        folder = Folder.at(place)
        kind = folder.kind()
        if kind != "folder":
            what = "a file; give the folder that it is in" if kind == "file" else "no such folder"
            raise SettingError(f"segment.{key}={place}: {what}")
        folders.append(folder)
    first, second = (os.path.realpath(folder.url) if folder.local else folder.url for folder in folders)
    if f"{first}/".startswith(f"{second}/") or f"{second}/".startswith(f"{first}/"):
        raise SettingError(
            f"segment.images={images} and segment.masks={masks}: one holds the other, so masks would be taken for images; "
            "give two folders beside each other"
        )
    return folders[0], folders[1]


def _listing(folder: Folder, key: str) -> list[str]:
    try:
        paths = list(folder.walk())
    except OSError as error:
        raise SettingError(f"segment.{key}: '{error.filename}' cannot be read: {error.strerror}") from None
    if not paths:
        raise SettingError(f"segment.{key}={folder}: holds no files")
    return paths


def _roots(images: list[str], masks: list[str]) -> dict[str, tuple[str, str]]:
    """The folder of each split, among the images and among the masks."""
    tops = []
    for paths in (images, masks):
        names = {path.partition("/")[0] for path in paths if "/" in path}
        tops.append({name.casefold(): name for name in sorted(names)})
    train = [next((top[name] for name in TRAIN_FOLDERS if name in top), None) for top in tops]
    if train[0] is None or train[1] is None:
        return {"train": ("", "")}
    roots = {"train": (train[0], train[1])}
    val = [next((top[name] for name in VAL_FOLDERS if name in top), None) for top in tops]
    if val[0] is not None and val[1] is not None:
        roots["val"] = val[0], val[1]
    return roots


def _keyed(
    paths: list[str], root: str, ending: str, suffixes: Set[str], what: str, rejects: list[tuple[str, str]]
) -> dict[str, str]:
    """Paths below `root` by what pairs them; files without the ending are passed over, others that do not fit rejected."""
    found: dict[str, str] = {}
    for path in sorted(paths):
        if root and not path.startswith(f"{root}/"):
            continue
        stem, suffix = os.path.splitext(path[len(root) :].lstrip("/"))
        if not stem.endswith(ending):
            continue
        key = stem.removesuffix(ending)
        if (shown := path.encode("utf-8", "backslashreplace").decode()) != path:
            rejects.append((shown, "file name is not valid UTF-8"))
        elif suffix.lower() not in suffixes:
            rejects.append((path, f"not {what} ({f'suffix {suffix}' if suffix else 'no suffix'})"))
        elif key in found:
            rejects.append((path, f"of the same name as {found[key]}"))
        else:
            found[key] = path
    return found


def _pair(found: Pairs, split: str, image_at: dict[str, str], mask_at: dict[str, str]) -> None:
    """Add the pairs of one split, and what is in none."""
    for key in sorted(image_at.keys() | mask_at.keys()):
        if key not in mask_at:
            found.rejects.append((image_at[key], "no mask"))
        elif key not in image_at:
            found.rejects.append((mask_at[key], "mask without an image"))
        else:
            found.splits[split].append(Pair(image_at[key], mask_at[key]))


def _hold_out(found: Pairs, share: float, seed: int) -> None:
    pairs = found.splits["train"]
    if len(pairs) < 2:
        raise SettingError("segment.images: one image with a mask is not enough, val needs one too; add more")
    out = held_out(len(pairs), seed, share)
    if out.all():
        out[np.flatnonzero(out)[0]] = False
    found.splits = {
        "train": [pair for pair, held in zip(pairs, out, strict=True) if not held],
        "val": [pair for pair, held in zip(pairs, out, strict=True) if held],
    }


def _nothing_paired(images: str, masks: str, found: Pairs) -> str:
    first = "; ".join(f"{path}: {reason}" for path, reason in (found.rejects[:1] + found.rejects[-1:]))
    return (
        f"segment.images={images}, segment.masks={masks}: no image has a mask ({first or 'no file has the endings'}); a "
        "mask is a PNG of the same relative path, but for segment.image_ending and segment.mask_ending"
    )


def read_pair(images: Folder, masks: Folder, pair: Pair, wanted: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """The middle square of an image, uint8 (C, S, S), and the values of its mask there, uint16 (S, S).

    Raises RejectedImage with the reason, also where one of the files cannot be read.
    """
    try:
        image, mask = images.read(pair.image), masks.read(pair.mask)
    except FileNotFoundError:
        raise RejectedImage("image or mask is gone") from None
    except OSError as error:
        raise RejectedImage(f"cannot be read ({error.strerror or error})") from None
    pixels = decode_image(image, pair.image, wanted)
    values = mask_values(mask)
    size = upright_size(image, wanted)
    if size != (values.shape[1], values.shape[0]):
        raise RejectedImage(f"sizes differ (image {size[0]}×{size[1]}, mask {values.shape[1]}×{values.shape[0]})")
    return pixels, nearest_square(values, wanted.size)


def mask_values(data: bytes) -> np.ndarray:
    """Values (H, W) of a mask, uint16: of a palette PNG the indices, of a grey one the numbers in the file.

    Raises RejectedImage on anything else.
    """
    if not data:
        raise RejectedImage("mask is an empty file")
    if not data.startswith(_PNG_MAGIC) or len(data) <= _PNG_COLOUR:
        raise RejectedImage("mask is no PNG")
    bits, colour = data[_PNG_BITS], data[_PNG_COLOUR]
    if colour not in (_GREY, _PALETTE):
        raise RejectedImage("mask has colours or transparency (one number a pixel is needed: grey or palette)")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            values = np.asarray(opened)
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise RejectedImage(f"mask is damaged ({type(error).__name__}: {error})") from None
    if values.ndim != 2:
        raise RejectedImage("mask is damaged (not one number a pixel)")
    scale = {2: 85, 4: 17}.get(bits, 1) if colour == _GREY else 1  # Pillow spreads few bits over the range of 8
    values = values.astype(np.int64) // scale
    return values.astype(np.uint16)


def upright_size(data: bytes, wanted: Pixels) -> tuple[int, int]:
    """Width and height of an image that `decode_image` has taken, as it is shown (by its EXIF orientation)."""
    if data.startswith(NPY_MAGIC):
        height, width = npy_samples(data, wanted).bands[0].shape
        return width, height
    try:
        with Image.open(io.BytesIO(data)) as image:
            (width, height), turned = image.size, image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
            turned = turned and image.format != "TIFF"  # whose size Pillow gives as it is shown
    except Exception:  # one that Pillow does not know
        samples = tiff_samples(data, wanted)
        height, width = samples.bands[0].shape
        turned = samples.orientation in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def nearest_square(values: np.ndarray, size: int) -> np.ndarray:
    """The middle square of values (H, W) at the nearest of size × size points: those that `decode_image` averages around."""
    height, width = values.shape
    left, top, right, bottom = middle_square(width, height)
    centres = (np.arange(size) + 0.5) / size
    rows = np.minimum((top + centres * (bottom - top)).astype(int), height - 1)
    columns = np.minimum((left + centres * (right - left)).astype(int), width - 1)
    return np.ascontiguousarray(values[rows[:, None], columns])
