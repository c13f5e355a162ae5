"""What the tasks of `wavemim embed` do: decode units of images and compute their features."""

from __future__ import annotations

import functools
import json
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from pipeline.config.load import load
from pipeline.errors import StageError
from pipeline.images.arrays import Pixels, RejectedImage
from pipeline.images.decode import decode_image
from pipeline.images.plan import Origin
from pipeline.images.sources import fetch
from pipeline.models.encoder_source import EncoderSource
from pipeline.runtime.ray_session import InActor, SessionInfo, ray_data, root_cause
from pipeline.tools.embed_sources import UNIT, Unit


def _decode(item: dict[str, np.ndarray], wanted: Pixels) -> dict[str, np.ndarray]:
    """One unit → "pixels" (n, C, H, W), uint8, and per image the "reason" why it cannot be read, or ''."""
    origin = json.loads(item["origin"][0])
    origin = Origin(**{**origin, "containers": tuple(origin["containers"])})
    rows = pa.ipc.open_stream(item["rows"][0]).read_all()
    paths = rows.column("path").to_pylist()
    pixels = np.zeros((len(rows), wanted.channels, wanted.size, wanted.size), np.uint8)
    reasons = [""] * len(rows)
    for index, data in fetch(origin, rows):
        try:
            if isinstance(data, str):
                raise RejectedImage(data)
            pixels[index] = decode_image(data, paths[index], wanted)
        except RejectedImage as error:
            reasons[index] = str(error)
    return {"pixels": pixels, "reason": np.array(reasons, object)}


def _encode(
    part: dict[str, np.ndarray], *, subject: EncoderSource, batch: int, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Pixels → "features" (n, F), float32, of the images that could be read."""
    if device == "cpu":
        torch.set_num_threads(1)
    model, width = _model_of(subject, torch.device(device))
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (subject.pixel_mean, subject.pixel_std)
    )
    kept = np.flatnonzero(part["reason"] == "")
    features = np.zeros((len(part["reason"]), width), np.float32)
    with torch.inference_mode():
        for start in range(0, len(kept), batch):
            index = kept[start : start + batch]
            pixels = torch.from_numpy(part["pixels"][index]).to(device)
            features[index] = model((pixels.float() - mean) / std).float().cpu().numpy()
    return {"features": features, "reason": part["reason"]}


_models: dict[tuple[str, str], tuple[Any, int]] = {}  # the last encoder of this process, and its number of features


def _model_of(subject: EncoderSource, device: torch.device) -> tuple[Any, int]:
    key = (subject.source, subject.fingerprint)
    if key not in _models:
        _models.clear()
        model = subject.model().to(device).eval()
        with torch.inference_mode():
            blank = torch.zeros(1, subject.channels, subject.image_size, subject.image_size, device=device)
            _, width = model(blank).shape
        _models[key] = model, width
    return _models[key]


def features_of(
    subject: EncoderSource, units: Sequence[Unit], session: SessionInfo, batch: int
) -> Generator[tuple[np.ndarray, str], None, None]:
    """Compute features with Ray Data.

    Args:
        subject: The encoder.
        units: The images.
        session: The Ray session.
        batch: Images per forward pass.

    Yields:
        Features (F,) and the reason why there are none, or '', of every image, in order.

    Raises:
        StageError: A task failed.
    """
    gpu = session.gpus >= 1
    data = (subject.recipe or load("small").dump())["data"]
    limits = subject.value_range or data["value_range"]
    wanted = Pixels(
        subject.image_size, subject.channels, data["max_pixels"], data["min_side"], limits, data.get("nodata")
    )
    decode = functools.partial(_decode, wanted=wanted)
    encode = functools.partial(_encode, subject=subject, batch=batch)
    same: dict[str, Any] = {"batch_format": "numpy"}
    try:
        with ray_data(session, in_order=True):
            items = ray.data.from_items([unit.as_item() for unit in units], override_num_blocks=len(units))
            decoded = items.map_batches(decode, batch_size=1, num_cpus=1, **same)
            if gpu:
                made = decoded.map_batches(
                    InActor,
                    fn_constructor_args=(functools.partial(encode, device="cuda"),),
                    batch_size=UNIT,
                    num_cpus=0,  # else tasks that decode for it may wait for its CPU for ever
                    num_gpus=1,
                    compute=ray.data.ActorPoolStrategy(min_size=1, max_size=int(session.gpus)),
                    **same,
                )
            else:
                made = decoded.map_batches(encode, batch_size=None, num_cpus=1, **same)
            for part in made.iter_batches(batch_size=None, prefetch_batches=1, **same):
                yield from zip(part["features"], part["reason"], strict=True)
    except ray.exceptions.RayError as error:
        raise StageError(f"a task failed: {root_cause(error)}; nothing is written") from error
