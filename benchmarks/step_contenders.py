"""Measurements of benchmarks/step.py: training steps on synthetic input, matrix products, and targets only."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

DEFAULT = ("wamim_vit_base", "mae_vit_base")
WARM_STEPS = 3  # on a GPU before anything is measured: compilation, memory, caches
MATRIX = {"cuda": 8192, "cpu": 2048}  # rows of the square matrices whose product is the device's rate


@dataclass(frozen=True)
class Settings:
    """The settings of one call."""

    recipes: tuple[str, ...] = DEFAULT
    overrides: tuple[str, ...] = ()
    batch: int = 8
    repeats: int = 3
    seconds: float = 5.0  # minimum duration of a repeat
    device: str = "cpu"
    dtype: str = "float32"
    modes: tuple[str, ...] = ("eager",)
    matrix: int = MATRIX["cpu"]


@dataclass
class Contender:
    """The training step of a recipe, ready to run."""

    name: str
    given: str  # the recipe's name, or its file
    recipe: Any
    cost: Any
    step: Any  # TrainStep
    batches: list[dict[int, Any]]  # whole rows, as the reader hands them over
    crop: Any  # the windows to cut from them; None where a view is cropped otherwise
    kept: int  # bytes of parameters, optimiser state and input
    steps: int = 0
    rates: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def run_once(self) -> None:
        """One step on the next batch."""
        stored = self.batches[self.steps % len(self.batches)]
        size = next(iter(stored.values())).shape[0]
        rows = torch.arange(size) + self.steps * size
        self.step(stored, rows, torch.ones(size), float(size), epoch=0, step=self.steps, crop=self.crop)
        self.steps += 1

    @property
    def images_per_second(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.rates)


def synthetic(
    recipe: Any, batch: int, seed: int
) -> tuple[dict[int, Any], dict[int, dict[str, dict[str, list[float]]]]]:
    """Quantised coefficients of random images, as a shard set stores them, and the statistics of their bands."""
    from pipeline.shards.layout import Layout
    from wavemim.wavelets import bands_of, decompose

    data = recipe.data
    layout = Layout(data.image_size, data.channels, recipe.steps_by_level(), data.wavelet)
    shape = (batch, data.channels, data.image_size, data.image_size)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).float()
    stored, found = {}, {}
    for level, values in decompose(images, data.levels, data.wavelet).items():
        whole = (values / recipe.steps_by_level()[level]).round().numpy()
        stored[level] = torch.from_numpy(whole.astype(layout.dtype(level)))
        spread = {band: values[:, :, index] for index, band in enumerate(bands_of(level, data.levels))}
        if "A" not in spread:  # not stored, but a target may need it
            spread["A"] = decompose(images, level, data.wavelet)[level][:, :, 0]
        found[level] = {
            band: {"mean": maps.mean((0, 2, 3)).tolist(), "std": maps.std((0, 2, 3)).tolist()}
            for band, maps in spread.items()
        }
    return stored, found


def windows(recipe: Any, batch: int) -> Any:
    """Windows as the reader draws them; None where images are cropped by the view (train.augment=rrc)."""
    from wavemim.inputs import Crop

    if recipe.train.augment == "rrc":
        return None
    draws, unit = torch.Generator().manual_seed(0), 2**recipe.data.levels
    places = (recipe.data.image_size - recipe.encoder.image_size) // unit + 1
    corners = torch.randint(0, places, (batch, 2), generator=draws) * unit
    mirrored = (torch.rand(batch, generator=draws) < 0.5) & recipe.train.flip
    return Crop(corners, mirrored, recipe.encoder.image_size)


def make_contender(name: str, settings: Settings, mode: str) -> Contender:
    """Model, optimiser and two batches of a recipe on the device."""
    from pipeline.models.build import build_inputs, build_model, build_views
    from wavemim.flops import cost_of
    from wavemim.optim import make_optimizer, make_schedule
    from wavemim.step import TrainStep

    recipe = load_recipe(name, settings)
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    batches, found = zip(*(synthetic(recipe, settings.batch, seed) for seed in range(2)), strict=True)
    channels = recipe.data.channels
    shards: Any = SimpleNamespace(  # the attributes of a shard set used below
        statistics=found[0],
        pixel_mean=[127.5] * channels,
        pixel_std=[74.0] * channels,
        steps=recipe.steps_by_level(),
        layout=SimpleNamespace(wavelet=recipe.data.wavelet),
    )
    before = _allocated(device)
    model = build_model(recipe, shards).to(device)
    views = build_views(recipe, model, build_inputs(shards).to(device), augment=True)
    optimizer = make_optimizer(model, lr=1e-4, weight_decay=recipe.train.weight_decay, betas=recipe.train.betas)
    step = TrainStep(
        model,
        views,
        optimizer,
        make_schedule(optimizer, total_steps=10**6, warmup_steps=10, min_lr=0.0),
        seed=recipe.seed,
        total_steps=10**6,
        clip_grad=recipe.train.clip_grad,
        precision=dtype,
        wrapped=torch.compile(model) if mode == "compiled" else None,
    )
    inputs = [_pinned(stored) if device.type == "cuda" else stored for stored in batches]
    label = f"{recipe.name} compiled" if mode == "compiled" else recipe.name
    crop = windows(recipe, settings.batch)
    contender = Contender(label, name, recipe, cost_of(model, recipe.mask.count), step, inputs, crop, 0)
    for _ in range(WARM_STEPS if device.type == "cuda" else 1):
        contender.run_once()
    _wait(device)
    contender.kept = _allocated(device) - before
    return contender


def load_recipe(name: str, settings: Settings) -> Any:
    """The recipe with the overrides of the call."""
    from pipeline.config.load import load

    return load(name, settings.overrides)


def measure_rate(contender: Contender, settings: Settings) -> None:
    """Record images/s over at least `seconds`, in whole steps, and on a GPU the peak memory."""
    device = torch.device(settings.device)
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        contender.run_once()  # allocates memory again
        _wait(device)
    steps, group, began = 0, 1, time.perf_counter()
    while steps == 0 or time.perf_counter() - began < settings.seconds:
        for _ in range(group):
            contender.run_once()
        _wait(device)
        steps += group
        group = min(2 * group, 16) if device.type == "cuda" else 1  # queued without synchronising, as in training
    contender.rates.append(steps * settings.batch / (time.perf_counter() - began))
    if device.type == "cuda":
        contender.peaks.append(torch.cuda.max_memory_allocated(device) - before + contender.kept)


def matmul_rate(settings: Settings) -> float:
    """FLOP/s of products of square matrices on this device in this type: the best of several, as hardware is rated."""
    device, dtype, n = torch.device(settings.device), getattr(torch, settings.dtype), settings.matrix
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    calls = 10 if device.type == "cuda" else 1
    found = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(calls):
            a @ b
        _wait(device)
        found.append(calls * 2 * n**3 / (time.perf_counter() - began))
    return max(found[1:])


def target_seconds(contender: Contender, settings: Settings, *, on_device: bool, calls: int = 30) -> float:
    """Median time in seconds to compute the wavelet targets of a batch, from stored coefficients or from the images."""
    device = torch.device(settings.device)
    step = contender.step
    target = copy.copy(step.model.target)
    target.on_device = on_device
    size = settings.batch
    view = step.views(contender.batches[0], torch.arange(size), epoch=0, crop=contender.crop)
    found = []
    for _ in range(calls):
        _wait(device)
        began = time.perf_counter()
        target(view.images, view.pyramid)
        _wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def peak_memory(recipe: str, **settings: Any) -> int:
    """Peak memory in bytes of a process that runs two steps, with its libraries; called in a child process."""
    lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    contender = make_contender(recipe, Settings(**{**settings, **lists}), "eager")
    contender.run_once()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _pinned(stored: dict[int, Any]) -> dict[int, Any]:
    return {level: values.pin_memory() for level, values in stored.items()}


def _wait(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: Any) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
