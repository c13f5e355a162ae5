"""Pretrain from Python, without Ray: a recipe, a shard set, a few training steps, a checkpoint, and features from it.

It runs the training loop that `wavemim pretrain` runs in each of its workers, in this process:

    wavemim demo out=wavemim-demo
    python examples/pretrain_from_python.py --shards wavemim-demo/shards --steps 20

Any setting of a recipe may follow, such as train.batch=32 or target.kind=pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import pipeline
import wavemim


def main() -> None:
    """Train, save a checkpoint, and load its encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="wavemim-demo/shards", help="a shard set, a folder or URL")
    parser.add_argument("--recipe", default="small", help="a recipe's name or YAML file")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--out", type=Path, default=Path("python-demo"), help="folder for the checkpoint")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="further settings of the recipe")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = pipeline.ShardSet.open(arguments.shards)
    recipe = pipeline.load_recipe(arguments.recipe, ["train.log_every=1", "train.warmup_epochs=0", *arguments.settings])
    steps_per_epoch = -(-shards.rows["train"] // min(recipe.train.batch, shards.rows["train"]))
    recipe = pipeline.with_overrides(recipe, {"train.epochs": arguments.steps / steps_per_epoch})
    print(f"{shards.rows['train']} images of {shards.image_size} px from {shards.url}, on {device}")

    folder = arguments.out / "checkpoint"
    trained = pipeline.train(
        recipe,
        shards,
        device=device,
        on_log=lambda metrics, images: print(f"{images:8d} images   loss {metrics['train/loss']:.4f}"),
        on_checkpoint=lambda saver, state: saver(folder),
    )
    parameters = sum(parameter.numel() for parameter in trained.model.encoder.parameters())
    print(f"trained an encoder of {parameters / 1e6:.1f} million parameters → {folder}")

    encoder = wavemim.load_encoder(folder)
    batch = next(pipeline.read_batches(shards, "train", 8, window=encoder.image_size, pixels=True))
    with torch.inference_mode():
        features = encoder(batch.pixels)  # uint8 (B, C, H, W) → (B, D)
    print(f"features of {len(features)} images: {tuple(features.shape)}, standard deviation {features.std():.3f}")


if __name__ == "__main__":
    try:
        main()
    except (pipeline.SettingError, pipeline.ShardError) as error:
        sys.exit(f"error: {error}")
