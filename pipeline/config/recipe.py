"""All settings of a run, where its files are, and which settings identify the work of a stage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from pipeline.config.behaviour import STAGES, Behaviour, behaviours, section, section_behaviours, setting, values_of
from pipeline.config.downstream import Evaluate, Export, Finetune, Segment, Tune
from pipeline.config.model_settings import Decoder, Encoder, Mask, Target
from pipeline.config.places import below, cache_of, is_url
from pipeline.config.settings import Cluster, Data, Section, Tracking, Train

_MODEL: dict[str, Any] = {"stages": ("pretrain", "tune", "run"), "searchable": True, "in_card": True}


class Recipe(Section):
    """All settings of a run."""

    name: str = setting(
        "",
        "Name of the run and of its folder OUT/runs/NAME.",
        operational=True,
        compared=False,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,  # stages and trials make longer names of it
    )
    images: str | None = setting(
        None,
        "Input images: a folder, a CSV or Parquet list, or Parquet or tar files that contain them; local or s3://…",
        stages=("prepare", "run"),
        identity=("prepare",),
        place=True,
    )
    out: str = setting(
        "wavemim-out",
        "Folder, or URL such as s3://BUCKET/RUNS, that everything is written to.",
        operational=True,
        compared=False,
        place=True,
        min_length=1,
    )
    # Shard sets and checkpoints identify themselves: stages add their fingerprints.
    shards: str | None = setting(
        None, "Shard set: a folder, or a URL such as s3://BUCKET/NAME. null: OUT/shards.", identity=(), place=True
    )
    checkpoint: str | None = setting(
        None,
        "Checkpoint to use. null: the run's latest. Other encoders: timm:NAME, or a folder in timm's format.",
        stages=("evaluate", "finetune", "segment", "export"),
        identity=(),
        place=True,
    )
    restart: bool = setting(
        False, "Discard what an earlier run of the stage wrote to the same folder.", operational=True, compared=False
    )
    force: bool = setting(
        False,
        "pretrain: resume from the latest checkpoint although train.lr, train.epochs or similar settings have changed.",
        stages=("pretrain", "run"),
        operational=True,
        compared=False,
    )
    seed: int = setting(0, "Seed of all random numbers.", ge=0, lt=2**63)
    # The shard set's fingerprint stands for the settings that it was prepared with.
    data: Data = section(Data, stages=("prepare", "pretrain", "run"), identity=("prepare",), in_card=True)
    encoder: Encoder = section(Encoder, **_MODEL)
    target: Target = section(Target, **_MODEL)
    decoder: Decoder = section(Decoder, **_MODEL)
    mask: Mask = section(Mask, **_MODEL)
    train: Train = section(Train, **_MODEL)
    evaluate: Evaluate = section(Evaluate, stages=("evaluate", "tune", "run"))
    finetune: Finetune = section(Finetune, stages=("finetune",))
    segment: Segment = section(Segment, stages=("segment",))
    tune: Tune = section(Tune, stages=("tune", "run"))
    export: Export = section(Export, stages=("export", "run"))
    tracking: Tracking = section(Tracking, stages=STAGES, operational=True, compared=False)
    cluster: Cluster = section(Cluster, stages=tuple(stage for stage in STAGES if stage != "export"), operational=True)
    # Keys of the settings that the user gave, which do not follow others. Not a part of the settings.
    _given: frozenset[str] = PrivateAttr(frozenset())

    def __eq__(self, other: object) -> bool:
        """Whether all settings are equal, whoever gave them."""
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # settings hold mappings

    @property
    def given(self) -> frozenset[str]:
        """Keys of the settings that the user gave, on the command line or in a file; unknown to other processes."""
        return self._given

    def with_given(self, keys: Iterable[str]) -> Recipe:
        """A copy that remembers that the user gave these settings."""
        copy = self.model_copy()
        copy._given = frozenset(keys)
        return copy

    # The layout of the out folder: shards and the MLflow store are shared by all runs in it.
    @property
    def shards_at(self) -> str:
        """The shard set: a folder or a URL."""
        return self.shards or below(self.out, "shards")

    @property
    def home(self) -> str | None:
        """URL of the out folder if it is in an object store; None if it is a local folder, shared by all nodes."""
        return self.out if is_url(self.out) else None

    @property
    def local_out(self) -> Path:
        """The out folder itself, or this machine's copy of one in an object store."""
        return Path(self.out) if self.home is None else cache_of(self.home)

    @property
    def run_dir(self) -> Path:
        """Folder of this run in `local_out`, with a folder for each stage."""
        return self.local_out / "runs" / self.name

    def stage_dir(self, stage: str) -> Path:
        """Folder of one stage of this run, in `local_out`."""
        return self.run_dir / stage

    def stage_home(self, stage: str) -> str | None:
        """URL of which `stage_dir` is a copy; None if the out folder is a local one."""
        return None if self.home is None else below(self.home, f"runs/{self.name}/{stage}")

    def place_of(self, path: str | Path) -> str:
        """A file in `local_out` as it is shown: by its URL, if the out folder is in an object store."""
        if self.home is None or not Path(path).is_relative_to(self.local_out):
            return str(path)
        return below(self.home, Path(path).relative_to(self.local_out).as_posix())

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
        """Predicted bands of every tapped level; empty for targets that predict no bands."""
        if not self.target.predicts_bands:
            return dict.fromkeys(sorted(self.target.taps), "")
        coarsest = max(self.target.taps)
        return {
            level: self.target.bands.get(level, "AHVD" if level == coarsest else "HVD")
            for level in sorted(self.target.taps)
        }

    def weights_by_level(self) -> dict[int, float]:
        """Loss weight λ of every tapped level."""
        return {level: self.target.weights.get(level, 1.0) for level in sorted(self.target.taps)}


BEHAVIOURS: Mapping[str, Behaviour] = behaviours(Recipe)  # of every setting, by its dotted key
_OF_SECTIONS = section_behaviours(Recipe)
_DEFAULTS = values_of(Recipe())
# Sections that a stage reads, in the order of its --help.
STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    stage: tuple(name for name, behaviour in _OF_SECTIONS.items() if stage in behaviour.stages) for stage in STAGES
}
# Settings that may change when pretraining resumes with force=true. The model and the order of its data stay the same.
CHANGEABLE = frozenset(key for key, behaviour in BEHAVIOURS.items() if behaviour.resumable)


def behaviour_of(key: str) -> Behaviour:
    """The behaviour of a setting.

    Args:
        key: Its dotted key. It may name an entry of a mapping, such as ``target.weights.3``, or a setting of another
            version of the project, which is treated like its section.

    Returns:
        Its behaviour, that of its section, or the default one.
    """
    while key and key not in BEHAVIOURS:
        shorter = key.rpartition(".")[0]
        if not shorter:
            return _OF_SECTIONS.get(key, Behaviour())
        key = shorter
    return BEHAVIOURS.get(key, Behaviour())


def identity(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings that decide what a stage computes.

    Args:
        recipe: All settings.
        stage: Name of the stage.

    Returns:
        Values by dotted key. Two runs of the stage with equal identities do the same work. A local `images` is made
        absolute.
    """
    kept: dict[str, Any] = {}
    for key, value in values_of(recipe).items():
        behaviour = BEHAVIOURS[key]
        if stage in behaviour.identity and not (behaviour.added and value == _DEFAULTS[key]):
            kept[key] = value
    if kept.get("images") and "://" not in kept["images"]:
        kept["images"] = str(Path(kept["images"]).resolve())
    return kept


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Compare two identities.

    Args:
        old: The one identity.
        new: The other one.

    Returns:
        A line "key: old → new" for every setting that differs, ordered by key.
    """
    old, new = json.loads(json.dumps(dict(old))), json.loads(json.dumps(dict(new)))
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def for_size(recipe: Recipe, size: int, stored_size: int, stored_levels: int) -> tuple[Recipe, int]:
    """The recipe of a phase of progressive training, for images of `size` pixels.

    Stored images are halved as often as the network's images shrink, rounded up where the stored ones are large enough: then
    the fewest levels are read. The returned recipe is as if the halved images had been stored. Levels of the wavelet target
    that are then missing are computed from the coarsest approximation.

    Args:
        recipe: All settings.
        size: Pixels per side of the network's images in this phase.
        stored_size: Pixels per side of the stored images.
        stored_levels: Levels of the stored pyramids.

    Returns:
        The recipe, and how often stored images are halved.
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
