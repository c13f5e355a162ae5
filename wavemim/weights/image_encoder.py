"""A pretrained encoder for one's own images: loaded from a run, a checkpoint or an exported folder, with what it needs to
turn images into its input.

Legend: B images, C channels, H = W pixels per side, D features.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from safetensors import safe_open
from torch import nn

from wavemim.data_statistics import STD_FLOOR
from wavemim.encoders.base import is_plain_vit
from wavemim.encoders.factory import make_encoder
from wavemim.encoders.pretrained import CONFIG, one_line
from wavemim.upright import resized_middle, turned_upright
from wavemim.weights import checkpoint
from wavemim.weights.checkpoint import CheckpointError

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray

_BEST = "best.json"  # pretraining's pointer to its best checkpoint
_ORIENTATION = ExifTags.Base.Orientation
# Raster formats only: Pillow would hand EPS and the like to external programs.
Image.init()
_WANTED = (
    "JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM", "PCX", "SGI", "QOI", "TGA",
)  # fmt: skip
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
_OF_VITS = ("patch_size", "width", "depth", "heads", "class_token", "positions")  # settings of plain ViTs only


class ImageEncoder(nn.Module):
    """A pretrained encoder in evaluation mode, with the size and normalisation of its images.

    It moves to a GPU as any module does, ``encoder.to("cuda")``, and runs there.

    Attributes:
        model: The timm model without a classifier: normalised images (B, C, H, W) → features (B, D).
        image_size: H, the size that the encoder was pretrained with.
        channels: C.
        value_range: Pixel values that become black and white, if pretraining was given such a range; else None.
        source: Where the weights came from.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        value_range: tuple[float, float] | None = None,
        source: str = "",
    ) -> None:
        """Wrap a timm model.

        Args:
            model: A timm model without a classifier.
            image_size: H.
            mean: Mean of each channel, for pixel values in [0, 255].
            std: Standard deviation of each channel, likewise.
            value_range: Pixel values that become black and white; None: 0 and 255.
            source: Where the weights came from, for messages.
        """
        super().__init__()
        self.model, self.image_size, self.channels = model, image_size, len(mean)
        self.value_range, self.source = value_range, source
        std = [max(value, STD_FLOOR) for value in std]
        self.register_buffer("mean", torch.tensor(mean).float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).float().view(1, -1, 1, 1), persistent=False)
        self.eval()

    @property
    def num_features(self) -> int:
        """D."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise pixel values in [0, 255], (B, C, H, W) of any dtype, by the mean and deviation of pretraining."""
        return (pixels.to(self.mean.device).float() - self.mean) / self.std

    def preprocess(self, images: ImageLike | Iterable[ImageLike]) -> torch.Tensor:
        """Turn images into the encoder's input.

        As in pretraining: upright by EXIF orientation, transparency on white, the middle square, resized with
        antialiasing, normalised.

        Args:
            images: Paths of image files, PIL images, or uint8 arrays (height, width) or (height, width, C); one, or
                several of any sizes. Encoders of other than 1 or 3 channels take arrays only.

        Returns:
            (B, C, H, W), float32, on the encoder's device.

        Raises:
            ValueError: If a file is not an image that PIL reads, or an image has the wrong type or channels.
            OSError: If a file cannot be opened.
        """
        several = [images] if isinstance(images, str | os.PathLike | Image.Image | np.ndarray) else images
        pixels = [self._pixels(image) for image in several]
        if not pixels:
            return self.mean.new_zeros(0, self.channels, self.image_size, self.image_size)
        return self.normalise(torch.from_numpy(np.stack(pixels)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute features.

        Args:
            images: (B, C, H, W): pixel values as uint8, or normalised images as floats.

        Returns:
            (B, D).
        """
        return self.model(images if images.is_floating_point() else self.normalise(images))

    def features(self, images: ImageLike | Iterable[ImageLike], *, batch: int = 64) -> torch.Tensor:
        """Compute features of images, as of `preprocess`, without gradients.

        Args:
            images: As for `preprocess`. Files are opened batch by batch, so that there may be any number of them.
            batch: Images that go through the encoder at once.

        Returns:
            (B, D), float32, on the CPU, in the order of the images.

        Raises:
            ValueError: As `preprocess` does.
            OSError: As `preprocess` does.
        """
        several = [images] if isinstance(images, str | os.PathLike | Image.Image | np.ndarray) else list(images)
        found = [torch.zeros(0, self.num_features)]
        with torch.inference_mode():
            for start in range(0, len(several), batch):
                found.append(self(self.preprocess(several[start : start + batch])).float().cpu())
        return torch.cat(found)

    def extra_repr(self) -> str:
        """Shown by ``print(encoder)``."""
        return f"image_size={self.image_size}, channels={self.channels}, source={self.source!r}"

    def _pixels(self, image: ImageLike) -> np.ndarray:
        """One image as uint8 (C, H, W)."""
        if isinstance(image, np.ndarray):
            return self._pixels_of_array(image)
        if isinstance(image, Image.Image):
            return self._pixels_of_photo(image)
        try:
            with Image.open(image, formats=_FORMATS) as opened:
                # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is large enough, as in pretraining
                grey = self.channels == 1 and self.value_range is None
                opened.draft("L" if grey else None, (self.image_size,) * 2)
                return self._pixels_of_photo(opened)
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except UnidentifiedImageError:
            raise ValueError(f"{os.fspath(image)}: not an image of a known format") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{os.fspath(image)}: {one_line(error)}") from None

    def _pixels_of_array(self, array: np.ndarray) -> np.ndarray:
        shape = " × ".join(map(str, array.shape))
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise ValueError(f"an array of {array.dtype} {shape}: must be uint8 (height, width) or (height, width, C)")
        if self.channels in (1, 3) and (array.ndim == 2 or array.shape[2] in (1, 3, 4)):
            return self._pixels_of_photo(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array))
        if array.ndim != 3 or array.shape[2] != self.channels:
            raise ValueError(f"an array of {shape}: the encoder takes images of {self.channels} channels")
        bands = [Image.fromarray(np.ascontiguousarray(array[..., band])) for band in range(self.channels)]
        return np.stack([resized_middle(self._in_range(band), self.image_size) for band in bands])

    def _pixels_of_photo(self, image: Image.Image) -> np.ndarray:
        if self.channels not in (1, 3):
            raise ValueError(
                f"the encoder takes images of {self.channels} channels; give uint8 arrays (height, width, C)"
            )
        if image.mode[0] in "IF" or (image.mode == "1" and self.value_range):
            raise ValueError(f"an image of mode '{image.mode}', not of 8 bits: convert it, or use wavemim embed")
        orientation = image.getexif().get(_ORIENTATION, 1)
        if image.has_transparency_data:
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        elif image.mode not in ("RGB", "L"):
            image = image.convert("RGB")
        image = self._in_range(image)
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        pixels = resized_middle(image.convert("L" if self.channels == 1 else "RGB"), self.image_size)
        return turned_upright(pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1), orientation)

    def _in_range(self, image: Image.Image) -> Image.Image:
        if self.value_range is None:
            return image
        low, high = self.value_range
        table = np.clip((np.arange(256) - low) * (255 / (high - low)) + 0.5, 0, 255).astype(np.uint8).tolist()
        return image.point([value for band in image.getbands() for value in (range(256) if band == "A" else table)])


def load_encoder(run: str | os.PathLike[str]) -> ImageEncoder:
    """Load a pretrained encoder from a local folder.

    Of a run the newest whole checkpoint is taken, or its exported encoder if it has no checkpoint. Where a checkpoint
    has an average of the weights (`train.ema`), the average is taken, as evaluation and export do. Weights are
    safetensors files; nothing is unpickled.

    Args:
        run: A run's folder (OUT/runs/NAME), a checkpoint's folder, a `best.json` that pretraining wrote, or a folder
            in timm's format such as `wavemim export` writes. A fine-tuned classifier's folder gives its encoder.

    Returns:
        The encoder, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: A ValueError: if there is no encoder in the folder, or it is damaged.
    """
    path = Path(run).expanduser()
    if path.name == _BEST:
        try:
            path = path.parent / json.loads(path.read_text(encoding="utf-8"))["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path}: no such file, or not one that pretraining wrote") from None
    if not path.is_dir():
        raise CheckpointError(f"{path}: {'a file; give a folder' if path.exists() else 'no such folder'}")
    if (path / checkpoint.STATE).is_file():
        return _of_checkpoint(path)
    if (path / CONFIG).is_file():
        return _of_timm_folder(path)
    for folder in (path, path / "pretrain"):
        newest = checkpoint.latest(folder)
        if newest is not None:
            return _of_checkpoint(newest)
    for folder in (path / "encoder", path / "export" / "encoder"):
        if (folder / CONFIG).is_file():
            return _of_timm_folder(folder)
    raise CheckpointError(
        f"{path}: no encoder in it; give a run's folder (OUT/runs/NAME), a checkpoint's, or an exported encoder's"
    )


def _of_checkpoint(folder: Path) -> ImageEncoder:
    state = checkpoint.read_state(folder)
    try:
        recipe = state["recipe"]
        settings, data = recipe["encoder"], recipe["data"]
        name, size, channels = str(settings["name"]), int(settings["image_size"]), int(data["channels"])
        plain = {key: settings[key] for key in _OF_VITS if key in settings} if is_plain_vit(name) else {}
        options = settings.get("options") or {}
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn and replaced
            encoder = make_encoder(name, image_size=size, channels=channels, options=options, **plain).model
        mean, std = _numbers(state["pixel_mean"], channels), _numbers(state["pixel_std"], channels)
        limits = data.get("value_range")
        value_range = None if limits is None else _pair(limits)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its encoder cannot be built: {one_line(error)}") from None
    file = folder / (checkpoint.AVERAGED if (folder / checkpoint.AVERAGED).is_file() else checkpoint.MODEL)
    prefix = "encoder.model."
    with safe_open(file, "pt") as tensors:
        names = [key for key in tensors.keys() if key.startswith(prefix)]  # noqa: SIM118  # not a dictionary
        weights = {key.removeprefix(prefix): tensors.get_tensor(key) for key in names}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not fit '{name}': {one_line(error)}") from None
    return ImageEncoder(encoder, image_size=size, mean=mean, std=std, value_range=value_range, source=str(folder))


def _of_timm_folder(folder: Path) -> ImageEncoder:
    if not (folder / checkpoint.MODEL).is_file():
        raise CheckpointError(f"{folder} lacks {checkpoint.MODEL}; other files of weights are not read")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        known: Mapping[str, Any] = config["pretrained_cfg"]
        channels, _, size = map(int, known["input_size"])
        mean, std = ([255 * value for value in _numbers(known[key], channels)] for key in ("mean", "std"))
        about = config.get("wavemim")
        limits = about.get("value_range") if isinstance(about, dict) else None
        value_range = None if limits is None else _pair(limits)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not one of timm's: {one_line(error)}") from None
    sized: dict[str, Any] = {"img_size": size} if known.get("fixed_input_size") else {}
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, in_chans=channels, **sized)
    except Exception as error:  # of timm's many kinds
        raise CheckpointError(f"{folder}: its encoder cannot be loaded: {one_line(error)}") from None
    return ImageEncoder(model, image_size=size, mean=mean, std=std, value_range=value_range, source=str(folder))


def _numbers(values: Any, count: int) -> list[float]:
    """`count` finite numbers. Raises ValueError."""
    numbers = [float(value) for value in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{values} are not {count} numbers")
    return numbers


def _pair(values: Any) -> tuple[float, float]:
    low, high = _numbers(values, 2)
    return low, high
