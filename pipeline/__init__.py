"""The stages around the method, from images to an exported encoder, and what a program or notebook needs of them.

    import pipeline

    recipe = pipeline.load_recipe("small", ["train.epochs=10"])
    shards = pipeline.ShardSet.open("wavemim-out/shards")
    trained = pipeline.train(recipe, shards, device=torch.device("cpu"))

The names in ``__all__`` are stable; the modules that they come from may move. They stand here and not in `wavemim`,
which knows neither recipes nor shard sets. Each is imported when it is first used, so that ``import pipeline`` and
the command line stay fast, and none of them needs a running Ray or MLflow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.load import load as load_recipe
    from pipeline.config.load import with_overrides
    from pipeline.config.recipe import Recipe
    from pipeline.errors import SettingError
    from pipeline.models.build import build_inputs, build_model, build_views
    from pipeline.shards.batches import Batch
    from pipeline.shards.batches import sequential as read_batches
    from pipeline.shards.layout import ShardError
    from pipeline.shards.reader import Reader
    from pipeline.shards.shard_set import ShardSet
    from pipeline.training.pretrain_loop import train

__all__ = [
    "Batch",
    "Reader",
    "Recipe",
    "SettingError",
    "ShardError",
    "ShardSet",
    "build_inputs",
    "build_model",
    "build_views",
    "load_recipe",
    "read_batches",
    "train",
    "with_overrides",
]

_HOMES = {
    "Batch": ("pipeline.shards.batches", "Batch"),
    "Reader": ("pipeline.shards.reader", "Reader"),
    "Recipe": ("pipeline.config.recipe", "Recipe"),
    "SettingError": ("pipeline.errors", "SettingError"),
    "ShardError": ("pipeline.shards.layout", "ShardError"),
    "ShardSet": ("pipeline.shards.shard_set", "ShardSet"),
    "build_inputs": ("pipeline.models.build", "build_inputs"),
    "build_model": ("pipeline.models.build", "build_model"),
    "build_views": ("pipeline.models.build", "build_views"),
    "load_recipe": ("pipeline.config.load", "load"),
    "read_batches": ("pipeline.shards.batches", "sequential"),
    "train": ("pipeline.training.pretrain_loop", "train"),
    "with_overrides": ("pipeline.config.load", "with_overrides"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
