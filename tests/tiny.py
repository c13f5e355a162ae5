"""A tiny model and its data, for tests of the method."""

import numpy as np
import torch

from wavemim.encoders.vit import ViTEncoder
from wavemim.inputs import Inputs
from wavemim.level_weights import LevelWeights
from wavemim.masking import Masking
from wavemim.model import DecoderSettings, MaskedImageModel
from wavemim.optim import make_average, make_optimizer, make_schedule
from wavemim.step import TrainStep
from wavemim.targets import Statistics, Tap, WaveletTarget
from wavemim.views import Views
from wavemim.wavelets import decompose, haar_sums

SIZE, PATCH, LEVELS = 32, 4, 4
TAPS = [Tap(1, 1, "HVD"), Tap(2, 2, "HVD"), Tap(3, 3, "AHVD")]  # finer than, equal to and coarser than a token


def photos(n=8, seed=0, size=SIZE):
    """Smooth random colour images (n, 3, size, size), uint8."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (n, 3, 5, 5)))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").numpy()
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def statistics(images, levels=LEVELS):
    """Statistics of images, computed level by level with one transform each."""
    mean, std = {}, {}
    for level in range(1, levels + 1):
        bands = decompose(images.astype(np.float64), level)[level]
        mean[level] = {b: bands[:, :, i].mean((0, 2, 3)).tolist() for i, b in enumerate("AHVD")}
        std[level] = {b: bands[:, :, i].std((0, 2, 3)).tolist() for i, b in enumerate("AHVD")}
    return Statistics(mean, std, images.mean((0, 2, 3)).tolist(), images.std((0, 2, 3)).tolist())


def stored(images):
    """Integers of a shard, exact: steps 2^-level."""
    return {level: torch.from_numpy(v) for level, v in haar_sums(images.astype(np.int32), LEVELS).items()}


STEPS = {level: 2.0**-level for level in range(1, LEVELS + 1)}


def make(images, *, taps=TAPS, seed=0, normalise="dataset", ratio=0.5, decoder=None, weighting="fixed", **kw):
    """(model, inputs) of a tiny ViT."""
    torch.manual_seed(seed)
    stats = statistics(images)
    encoder = ViTEncoder("vit_tiny_patch16_224", image_size=SIZE, patch_size=PATCH, width=32, depth=3, heads=2, **kw)
    sizes = {tap.level: PATCH for tap in taps}
    target = WaveletTarget(taps, stats, image_size=SIZE, token_sizes=sizes, normalise=normalise)
    model = MaskedImageModel(
        encoder,
        target,
        hidden=masking_of(ratio).hidden,
        decoder=decoder or DecoderSettings(width=16, depth=1, heads=2),
        level_weights=LevelWeights([1.0 / tap.level for tap in target.taps], weighting),
    )
    return model, Inputs(STEPS, stats)


def masking_of(ratio=0.5):
    """Random masks of the tiny ViT."""
    return Masking("random", ratio, SIZE // PATCH)


def make_step(
    images,
    *,
    lr=1e-3,
    steps=100,
    ratio=0.5,
    wrap=None,
    world=1,
    clip=None,
    ema=None,
    device="cpu",
    optimizer="adamw",
    masks=1,
    **kw,
):
    """A whole training step around a tiny model."""
    model, inputs = (part.to(device) for part in make(images, ratio=ratio, **kw))
    optimizer = make_optimizer(model, lr=lr, weight_decay=0.05, betas=(0.9, 0.95), kind=optimizer)
    schedule = make_schedule(optimizer, total_steps=steps, warmup_steps=5, min_lr=lr / 100)
    return TrainStep(
        model,
        Views(inputs, masking_of(ratio), seed=0, masks=masks),
        optimizer,
        schedule,
        seed=0,
        total_steps=steps,
        clip_grad=clip,
        precision=torch.float32,
        averaged=make_average(model, ema) if ema else None,
        wrapped=wrap(model) if wrap else None,
        world=world,
    )
