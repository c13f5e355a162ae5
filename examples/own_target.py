"""A prediction target of your own: the second derivative of brightness, registered as `laplacian` and trained.

    wavemim demo out=wavemim-demo
    python examples/own_target.py --shards wavemim-demo/shards --steps 20

It also works on the command line, with any number of workers:

    wavemim pretrain out=wavemim-demo name=laplacian target.kind=laplacian target.module=examples/own_target.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F

import pipeline
from wavemim.optim import make_optimizer, make_schedule
from wavemim.step import TrainStep
from wavemim.targets import Statistics, Tap, Target, register_target
from wavemim.targets.base import moments, to_positions


@register_target("laplacian")
class LaplacianTarget(Target):
    """How brightness curves at each pixel: edges and blobs, whatever the light. D = side², P positions per side."""

    def __init__(self, taps: list[Tap], statistics: Statistics, *, distance: int = 1, **settings: Any) -> None:
        """`distance` in pixels to the neighbours that a pixel is compared with (target.options.distance)."""
        super().__init__(taps, statistics, **settings)
        self.distance = distance
        kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        self.register_buffer("kernel", kernel[None, None], persistent=False)

    def side(self, level: int) -> int:
        """Pixels per side of one position."""
        return max(self.token_sizes[level], self.cell_size(level))

    def values(self, tap: Tap) -> int:
        """D, how many numbers a position predicts."""
        return self.side(tap.level) ** 2

    def forward(self, images: torch.Tensor, pyramid: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Level → (B, P², D) of normalised images (B, C, H, W); the stored coefficients are not needed."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            grey = F.pad(images.float().mean(1, keepdim=True), (self.distance,) * 4, mode="replicate")
            curved = F.conv2d(grey, self.get_buffer("kernel"), dilation=self.distance)
            targets = {tap.level: to_positions(curved[:, :, None], self.side(tap.level)) for tap in self.taps}
            if self.normalise != "patch":
                return targets
            scales = {level: moments(vectors) for level, vectors in targets.items()}
            return {level: (targets[level] - mean) / deviation for level, (mean, deviation) in scales.items()}


def main() -> None:
    """Train a small model on the target, with the loop written out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="wavemim-demo/shards", help="a shard set, a folder or URL")
    parser.add_argument("--steps", type=int, default=20, help="training steps, at most an epoch")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the recipe `small`")
    arguments = parser.parse_args()

    shards = pipeline.ShardSet.open(arguments.shards)
    own = ["target.kind=laplacian", f"target.module={__file__}"]  # a checkpoint then says where its target is defined
    recipe = pipeline.load_recipe("small", ["train.batch=64", *own, *arguments.settings])
    model = pipeline.build_model(recipe, shards)
    views = pipeline.build_views(recipe, model, pipeline.build_inputs(shards), augment=True)
    optimizer = make_optimizer(
        model, lr=recipe.train.lr * recipe.train.batch / 256, weight_decay=0.05, betas=(0.9, 0.95)
    )
    steps, rate = arguments.steps, optimizer.param_groups[0]["lr"]
    schedule = make_schedule(optimizer, total_steps=steps, warmup_steps=steps // 10, min_lr=rate / 100)
    step = TrainStep(
        model, views, optimizer, schedule, seed=recipe.seed, total_steps=steps, clip_grad=1.0, precision=torch.float32
    )
    batch_size = min(recipe.train.batch, shards.rows["train"])
    reader = pipeline.Reader(shards, "train", batch=batch_size, window=recipe.encoder.image_size, flip=True)
    for number, batch in enumerate(islice(reader.epoch(0), steps)):
        result = step(batch.levels, batch.rows, batch.weight, batch.total, epoch=0, step=number, crop=batch.crop)
        levels = "   ".join(f"level {n} {loss:.4f}" for n, loss in zip(model.levels, result.losses, strict=True))
        print(f"step {number + 1:3d}   loss {float(result.losses.sum()):.4f}   {levels}")


if __name__ == "__main__":
    try:
        main()
    except (pipeline.SettingError, pipeline.ShardError) as error:
        sys.exit(f"error: {error}")
