"""All settings of a run together, where its files lie, and which settings a stage depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config.downstream import Evaluate, Export, Finetune, Segment, Tune
from pipeline.config.settings import Cluster, Data, Decoder, Encoder, Mask, Section, Target, Tracking, Train


class Recipe(Section):
    """Everything a run needs."""

    name: str = Field("", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and of its folder")
    images: str | None = Field(
        None,
        description="images: a folder, a CSV or Parquet list, Parquet or tar files that hold them; local or s3://…",
    )
    out: str = Field("wavemim-out", min_length=1, description="folder that everything is written to")
    shards: str | None = Field(
        None, description="shard set, a folder or URL such as s3://BUCKET/NAME; null: OUT/shards"
    )
    checkpoint: str | None = Field(
        None,
        description="checkpoint to use; null: the run's own last one; to judge others: timm:NAME, or a folder in timm's format",
    )
    restart: bool = Field(False, description="throw away what an earlier call wrote to the same place")
    force: bool = Field(
        False, description="pretrain: go on from the last checkpoint with another train.lr, train.epochs and the like"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    data: Data = Data()  # type: ignore[call-arg]
    encoder: Encoder = Encoder()  # type: ignore[call-arg]
    target: Target = Target()  # type: ignore[call-arg]
    decoder: Decoder = Decoder()  # type: ignore[call-arg]
    mask: Mask = Mask()  # type: ignore[call-arg]
    train: Train = Train()  # type: ignore[call-arg]
    evaluate: Evaluate = Evaluate()  # type: ignore[call-arg]
    finetune: Finetune = Finetune()  # type: ignore[call-arg]
    segment: Segment = Segment()  # type: ignore[call-arg]
    tune: Tune = Tune()  # type: ignore[call-arg]
    export: Export = Export()  # type: ignore[call-arg]
    tracking: Tracking = Tracking()  # type: ignore[call-arg]
    cluster: Cluster = Cluster()  # type: ignore[call-arg]

    # The layout of the out folder: shards and the MLflow store are shared by all runs in it.
    @property
    def shards_at(self) -> str:
        """The shard set: a folder or a URL."""
        return self.shards or str(Path(self.out) / "shards")

    @property
    def run_dir(self) -> Path:
        """Folder of this run: one folder a stage inside it."""
        return Path(self.out) / "runs" / self.name

    def stage_dir(self, stage: str) -> Path:
        """Folder of one stage of this run."""
        return self.run_dir / stage

    def dump(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return self.model_dump(mode="json")

    def steps_by_level(self) -> dict[int, float]:
        """Quantisation step of every stored level, in coefficient units."""
        steps = self.data.steps
        if steps == "lossless":  # Haar coefficients are multiples of 2^-level
            return {level: 2.0**-level for level in range(1, self.data.levels + 1)}
        return {level: steps[min(level, len(steps)) - 1] for level in range(1, self.data.levels + 1)}

    def bands_by_level(self) -> dict[int, str]:
        """Bands predicted at every tapped level: of wavelets; other targets have none."""
        if not self.target.predicts_bands:
            return dict.fromkeys(sorted(self.target.taps), "")
        coarsest = max(self.target.taps)
        return {
            level: self.target.bands.get(level, "AHVD" if level == coarsest else "HVD")
            for level in sorted(self.target.taps)
        }

    def weights_by_level(self) -> dict[int, float]:
        """Level weights λ of every tapped level."""
        return {level: self.target.weights.get(level, 1.0) for level in sorted(self.target.taps)}


# What a stage reads: shown by its --help, and what makes two calls of it the same call.
STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": ("data", "tracking", "cluster"),
    "pretrain": ("data", "encoder", "target", "decoder", "mask", "train", "tracking", "cluster"),
    "evaluate": ("evaluate", "tracking", "cluster"),
    "finetune": ("finetune", "tracking", "cluster"),
    "segment": ("segment", "tracking", "cluster"),
    "tune": ("encoder", "target", "decoder", "mask", "train", "evaluate", "tune", "tracking", "cluster"),
    "export": ("export", "tracking"),
    "run": (
        "data",
        "encoder",
        "target",
        "decoder",
        "mask",
        "train",
        "evaluate",
        "tune",
        "export",
        "tracking",
        "cluster",
    ),
}
_OPERATIONAL = {
    "train": {
        "workers",
        "parallel",  # sums are added up in another order
        "channels_last",
        "checkpoint_every",
        "checkpoint_minutes",
        "checkpoints_at",
        "hang_timeout",
        "keep_checkpoints",
        "keep_best",
        "log_every",
        "reader_threads",
        "compile",
        "recompute",
        "max_skipped",
        "progress_seconds",
        "monitor_minutes",
    },
    "data": {"max_rejected"},
    "target": {"module"},  # where the class that target.kind names is found
    "tune": {"concurrent"},
    "export": {"onnx", "registry"},  # added to what is there
    "evaluate": {"batch"},
    "segment": {"batch", "max_rejected"},
    "finetune": {"workers", "eval_batch", "reader_threads", "log_every"},
}


# Settings that came later: folders from before them, which do not name them, are those of the default.
_ADDED: dict[str, Any] = {"target.options": {}}

# Of pretraining: what a run can be gone on with under another value (force=true). Its model and the order of its data
# stay what they are.
CHANGEABLE = frozenset(
    {
        *("train.epochs", "train.lr", "train.min_lr_share", "train.warmup_epochs", "train.weight_decay", "train.betas"),
        *("train.clip_grad", "train.accumulate", "train.precision", "train.flip", "train.crop_scale"),
        *("mask.ratio", "target.weights"),
    }
)


def identity(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings that decide what `stage` computes, flat; those that only say how and where are left out."""
    kept: dict[str, Any] = {"seed": recipe.seed}
    if stage == "prepare":
        local = recipe.images and "://" not in recipe.images
        kept["images"] = str(Path(recipe.images or "").resolve()) if local else recipe.images
    for section in STAGE_SECTIONS[stage]:
        if section in ("tracking", "cluster") or (section == "data" and stage != "prepare"):
            continue
        for key, value in recipe.dump()[section].items():
            dotted = f"{section}.{key}"
            if key not in _OPERATIONAL.get(section, ()) and not (dotted in _ADDED and value == _ADDED[dotted]):
                kept[dotted] = value
    return kept


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines 'key: old → new' for every setting that differs between two identities."""
    old, new = json.loads(json.dumps(dict(old))), json.loads(json.dumps(dict(new)))
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def for_size(recipe: Recipe, size: int, stored_size: int, stored_levels: int) -> tuple[Recipe, int]:
    """The recipe for images of `size` pixels, and how often the stored ones, of `stored_size`, are halved for it.

    As often as the network's images shrink, rounded up where the stored ones are large enough: then the fewest levels
    are read. The recipe is as if the halved images had been stored; the wavelet target's levels that are then missing
    are computed from the coarsest approximation.
    """
    halvings = 0
    while (
        size << halvings < recipe.encoder.image_size
        and size << (halvings + 1) <= stored_size
        and halvings + 1 < stored_levels
    ):
        halvings += 1
    deepest = max(recipe.target.taps) if recipe.target.predicts_bands else 1
    data = {"image_size": stored_size >> halvings, "levels": max(stored_levels - halvings, deepest)}
    sections = {
        "encoder": recipe.encoder.model_copy(update={"image_size": size}),
        "data": recipe.data.model_copy(update=data),
        "train": recipe.train.model_copy(update={"progressive": {}}),
    }
    return recipe.model_copy(update=sections), halvings
