"""Images with masks for segmentation: pairing the files of two folders, and reading a pair. No Ray in here."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipeline.errors import SettingError
from pipeline.images.arrays import NPY_MAGIC, Pixels, RejectedImage, npy_samples, tiff_samples
from pipeline.images.decode import ORIENTATION_TAG, SUFFIXES, decode_image
from pipeline.images.names import NOT_UTF8, TEST, TRAIN, TRAIN_FOLDERS, VAL, VAL_FOLDERS, split_of
from pipeline.storage.folder import Folder
from wavemim.evaluation.probes import held_out
from wavemim.upright import middle_square

MASK_SUFFIX = ".png"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_BITS, _PNG_COLOUR = 24, 25  # offsets of bit depth and colour type in a PNG
_GREY, _PALETTE = 0, 3  # colour types of PNG


@dataclass(frozen=True)
class Pair:
    """An image and its mask, as paths relative to the two folders."""

    image: str
    mask: str


@dataclass
class Pairs:
    """The pairs of two folders. Every input is in one of the splits, rejected, or skipped.

    Attributes:
        splits: Pairs of train and val.
        rejects: (path, reason) of files without a partner, and of others that cannot be used.
        skipped: Number of pairs beyond the maximum.
        layout: How the splits were found, in a few words.
    """

    splits: dict[str, list[Pair]]
    rejects: list[tuple[str, str]] = field(default_factory=list)
    skipped: int = 0
    layout: str = ""

    @property
    def inputs(self) -> int:
        """Number of pairs, and of files without a partner."""
        return sum(map(len, self.splits.values())) + len(self.rejects) + self.skipped

    def digest(self, images: Folder, masks: Folder) -> str:
        """SHA-256 of names and splits of all pairs, and of sizes and times of local files: masks may be corrected."""
        lines = (
            f"{split}\0{pair.image}\0{_version(images, pair.image)}\0{pair.mask}\0{_version(masks, pair.mask)}"
            for split, pairs in self.splits.items()
            for pair in pairs
        )
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _version(folder: Folder, path: str) -> str:
    """Size and modification time of a local file; empty for a remote one."""
    if folder.local is None:
        return ""
    try:
        found = os.stat(folder.local / path)
    except OSError:  # missing: reading it will reject the pair
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
    """Pair images and masks that have the same relative path apart from suffix and endings.

    If both folders have a folder for train, the splits are this and the first for val or test that both have; the usual
    names are recognised, also as train2017 or val_masks. The result depends only on the names and the arguments.

    Args:
        images: Folder or URL of the images.
        masks: Folder or URL of the PNG masks.
        image_ending: What the names of images end with, before the suffix; other files are skipped.
        mask_ending: Likewise for masks.
        val_share: Share of the pairs held out for val where the folders have no val.
        max_images: Maximum number of pairs in each split; None for all.
        seed: Decides which pairs are held out, and which are kept.

    Raises:
        SettingError: A folder does not exist, or there are no pairs.
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
            f"segment.masks={masks}: no image in {roots['val'][0]}/ has a mask; add masks, or remove the folder"
        )
    if "val" not in roots:
        _hold_out(found, val_share, seed)
    train = f"{roots['train'][0]}/" if roots["train"][0] else "one folder"
    found.layout = f"{train} and {roots['val'][0]}/" if "val" in roots else f"{train}, val held out"
    if max_images is not None:
        for split, pairs in found.splits.items():
            kept = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:max_images])
            found.skipped += len(pairs) - len(kept)
            found.splits[split] = [pairs[i] for i in kept]
    return found


def _folders(images: str, masks: str) -> tuple[Folder, Folder]:
    folders = []
    for key, place in (("images", images), ("masks", masks)):
        folder = Folder.at(place)
        kind = folder.kind()
        if kind != "folder":
            what = "this is a file; give its folder" if kind == "file" else "no such folder"
            raise SettingError(f"segment.{key}={place}: {what}")
        folders.append(folder)
    first, second = (os.path.realpath(folder.url) if folder.local else folder.url for folder in folders)
    if f"{first}/".startswith(f"{second}/") or f"{second}/".startswith(f"{first}/"):
        raise SettingError(
            f"segment.images={images} and segment.masks={masks}: one folder contains the other, so masks would be "
            "recognised as images; give two separate folders"
        )
    return folders[0], folders[1]


def _listing(folder: Folder, key: str) -> list[str]:
    try:
        paths = list(folder.walk())
    except OSError as error:
        raise SettingError(f"segment.{key}: '{error.filename}' cannot be read: {error.strerror}") from None
    if not paths:
        raise SettingError(f"segment.{key}={folder}: no files in it")
    return paths


def _roots(images: list[str], masks: list[str]) -> dict[str, tuple[str, str]]:
    """The folders of each split, for images and masks; "" for all."""
    tops = [{path.partition("/")[0] for path in paths if "/" in path} for paths in (images, masks)]
    train = [_top(top, TRAIN_FOLDERS, (TRAIN,)) for top in tops]
    if train[0] is None or train[1] is None:
        return {"train": ("", "")}
    roots = {"train": (train[0], train[1])}
    val = [_top(top, VAL_FOLDERS, (VAL, TEST)) for top in tops]
    if val[0] is not None and val[1] is not None:
        roots["val"] = val[0], val[1]
    return roots


def _top(names: Set[str], usual: tuple[str, ...], splits: tuple[str, ...]) -> str | None:
    """The folder of a split: the first with a usual name, in any case, or with a name such as train2017 or train_masks."""
    of = {name.casefold(): name for name in sorted(names)}
    exact = next((of[name] for name in usual if name in of), None)
    named = (name for split in splits for name in sorted(names) if split_of(name, names, annotations=True) == split)
    return exact or next(named, None)


def _keyed(
    paths: list[str], root: str, ending: str, suffixes: Set[str], what: str, rejects: list[tuple[str, str]]
) -> dict[str, str]:
    """Paths under `root` by the key that pairs them. Files without the ending are skipped, unsuitable ones rejected."""
    found: dict[str, str] = {}
    for path in sorted(paths):
        if root and not path.startswith(f"{root}/"):
            continue
        stem, suffix = os.path.splitext(path[len(root) :].lstrip("/"))
        if not stem.endswith(ending):
            continue
        key = stem.removesuffix(ending)
        if (shown := path.encode("utf-8", "backslashreplace").decode()) != path:
            rejects.append((shown, NOT_UTF8))
        elif suffix.lower() not in suffixes:
            rejects.append((path, f"not {what} ({f'suffix {suffix}' if suffix else 'no suffix'})"))
        elif key in found:
            rejects.append((path, f"the same name as {found[key]}"))
        else:
            found[key] = path
    return found


def _pair(found: Pairs, split: str, image_at: dict[str, str], mask_at: dict[str, str]) -> None:
    """Add the pairs of one split, and the files without a partner to the rejects."""
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
        raise SettingError("segment.images: only one image has a mask, but val needs one too; add more")
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
        f"segment.images={images}, segment.masks={masks}: no image has a mask ({first or 'no file has the endings'}); "
        "a mask is a PNG with the relative path of its image, apart from segment.image_ending and segment.mask_ending"
    )


def read_pair(images: Folder, masks: Folder, pair: Pair, wanted: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its mask, both cropped to the central square and resized to S × S pixels.

    Returns:
        Pixels (C, S, S), uint8, and values of the mask (S, S), uint16.

    Raises:
        RejectedImage: A file cannot be read or decoded, or the sizes of the two differ.
    """
    try:
        image, mask = images.read(pair.image), masks.read(pair.mask)
    except FileNotFoundError:
        raise RejectedImage("image or mask no longer exists") from None
    except OSError as error:
        raise RejectedImage(f"cannot be read ({error.strerror or error})") from None
    pixels = decode_image(image, pair.image, wanted)
    values = mask_values(mask)
    size = upright_size(image, wanted)
    if size != (values.shape[1], values.shape[0]):
        raise RejectedImage(f"sizes differ (image {size[0]}×{size[1]}, mask {values.shape[1]}×{values.shape[0]})")
    return pixels, nearest_square(values, wanted.size)


def mask_values(data: bytes) -> np.ndarray:
    """Decode a PNG mask.

    Returns:
        Values (H, W), uint16: the indices of a palette PNG, the numbers in the file of a grey PNG.

    Raises:
        RejectedImage: It is damaged, or not such a PNG.
    """
    if not data:
        raise RejectedImage("mask is an empty file")
    if not data.startswith(_PNG_MAGIC) or len(data) <= _PNG_COLOUR:
        raise RejectedImage("mask is not a PNG")
    bits, colour = data[_PNG_BITS], data[_PNG_COLOUR]
    if colour not in (_GREY, _PALETTE):
        raise RejectedImage("mask has colours or transparency (one number per pixel is needed: grey or palette)")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            values = np.asarray(opened)
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise RejectedImage(f"mask is damaged ({type(error).__name__}: {error})") from None
    if values.ndim != 2:
        raise RejectedImage("mask is damaged (not one number per pixel)")
    scale = {2: 85, 4: 17}.get(bits, 1) if colour == _GREY else 1  # Pillow scales fewer bits to the range of 8
    values = values.astype(np.int64) // scale
    return values.astype(np.uint16)


def upright_size(data: bytes, wanted: Pixels) -> tuple[int, int]:
    """Width and height in pixels of an image that can be decoded, turned upright by its EXIF orientation."""
    if data.startswith(NPY_MAGIC):
        height, width = npy_samples(data, wanted).bands[0].shape
        return width, height
    try:
        with Image.open(io.BytesIO(data)) as image:
            (width, height), turned = image.size, image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
            turned = turned and image.format != "TIFF"  # Pillow gives the upright size of a TIFF
    except Exception:  # not supported by Pillow
        samples = tiff_samples(data, wanted)
        height, width = samples.bands[0].shape
        turned = samples.orientation in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def nearest_square(values: np.ndarray, size: int) -> np.ndarray:
    """Resize the central square of values (H, W) to (size, size) by nearest neighbours, aligned with `decode_image`."""
    height, width = values.shape
    left, top, right, bottom = middle_square(width, height)
    centres = (np.arange(size) + 0.5) / size
    rows = np.minimum((top + centres * (bottom - top)).astype(int), height - 1)
    columns = np.minimum((left + centres * (right - left)).astype(int), width - 1)
    return np.ascontiguousarray(values[rows[:, None], columns])
