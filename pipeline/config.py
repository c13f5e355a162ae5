"""The typed configuration: the one door through which settings come in.

A *recipe* is a YAML file. A run's settings are a recipe (and the recipes it is based on), then ``key=value`` overrides;
`load` joins and checks them and gives back one frozen `Recipe`. What is wrong becomes a `SettingError`, one line.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

DEFAULT_RECIPE = "small"
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Bands = Annotated[str, Field(pattern="^A?H?V?D?$", min_length=1)]


def _steps(value: Any) -> Any:
    """One number stands for all levels."""
    numbers = [value] if isinstance(value, int | float) else value
    if value == "lossless":
        return value
    if not isinstance(numbers, list | tuple) or not numbers:
        raise ValueError("allowed are numbers above 0, from the finest level on, such as [4, 2, 1], or lossless")
    numbers = [_number_like(step) if isinstance(step, str) else step for step in numbers]
    if any(isinstance(step, bool) or not isinstance(step, int | float) or not step > 0 for step in numbers):
        raise ValueError("every step has to be a number above 0")
    return tuple(numbers)


Steps = Annotated[tuple[float, ...] | Literal["lossless"], BeforeValidator(_steps)]


class SettingError(ValueError):
    """A mistake in the settings: one line that says what was wrong, what is allowed and what to do."""


class Section(BaseModel):
    """Base of every group of settings: frozen, and no key that is not known."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """How images become a shard set."""

    image_size: Positive = Field(256, description="side of the stored images in pixels; a multiple of 2^levels")
    channels: int = Field(3, ge=1, le=16, description="channels; other than 1 and 3 come from multi-band TIFF or .npy")
    wavelet: str = Field("haar", description="wavelet of the stored pyramid: any discrete one of PyWavelets")
    levels: Positive = Field(5, le=8, description="levels of the stored pyramid")
    steps: Steps = Field(
        (4, 4, 8),
        description="quantisation step of each level from the finest, the last one counts for the rest; "
        "or 'lossless' (Haar alone): the very pixels come back",
    )
    value_range: tuple[float, float] | None = Field(
        None, description="pixel values that become black and white; null: the whole range of the file's integer type"
    )
    max_pixels: Positive = Field(100_000_000, description="larger images are rejected undecoded")
    min_side: Positive = Field(8, description="images with a shorter side below this are rejected")
    image_column: str | None = Field(None, description="column of a list or of Parquet that names or holds the image")
    label_column: str | None = Field(None, description="column of a list or of Parquet that holds the label")
    rows_per_shard: Positive = Field(1024, description="images in one Parquet file")
    rows_per_group: Positive = Field(64, description="images in one row group, the unit of reading")
    val_share: float = Field(0.1, ge=0, lt=1, description="share held out for val where the folder names no val split")
    max_rejected: Share = Field(
        0.01, description="share of rejected inputs that ends the stage (10 are always allowed)"
    )


class Encoder(Section):
    """The backbone, a timm model."""

    name: str = Field("vit_base_patch16_224", description="timm model name")
    image_size: Positive = Field(224, description="side of the training window; a multiple of patch_size and 2^levels")
    patch_size: Positive = Field(16, description="side of a patch in pixels")
    width: Positive | None = Field(None, description="embedding width; null: the timm model's own")
    depth: Positive | None = Field(None, description="number of blocks; null: the timm model's own")
    heads: Positive | None = Field(None, description="attention heads; null: the timm model's own")
    class_token: bool = Field(True, description="with a class token")
    positions: Literal["sincos", "learned"] = Field("sincos", description="fixed sine-cosine or learned positions")


class Target(Section):
    """What each tap is asked for. Keys of the three mappings are wavelet levels, 1 is the finest."""

    kind: Literal["wavelet"] = Field("wavelet", description="what is predicted")
    taps: dict[Positive, Positive] = Field(
        {2: 2, 3: 4, 4: 10, 5: 12}, min_length=1, description="level: encoder block (from 1) that predicts it"
    )
    weights: dict[Positive, Annotated[float, Field(ge=0)]] = Field(
        {}, description="level: weight of its loss in the sum; 1 where not named"
    )
    bands: dict[Positive, Bands] = Field(
        {}, description="level: bands predicted, of A, H, V, D; where not named HVD, and AHVD at the coarsest tap"
    )
    normalise: Literal["level", "patch", "none"] = Field(
        "level", description="by the shard set's statistics per level and band, per patch, or not"
    )


class Decoder(Section):
    """The light decoder of each tap."""

    width: Positive = Field(256, description="embedding width")
    depth: int = Field(1, ge=0, description="transformer blocks")
    heads: Positive = Field(8, description="attention heads")


class Mask(Section):
    """Which patches are hidden."""

    kind: Literal["random"] = Field("random", description="how patches are chosen")
    ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is hidden")


class Train(Section):
    """Pretraining: length, batch, optimiser, workers."""

    epochs: float = Field(100, gt=0, description="passes over the train split")
    batch: Positive = Field(256, description="images in a step, over all workers")
    workers: Positive = Field(1, description="data-parallel workers")
    lr: float = Field(1.5e-4, gt=0, description="learning rate for a batch of 256; scaled by batch/256")
    min_lr_share: Share = Field(0.01, description="the cosine ends at this share of the peak")
    warmup_epochs: float = Field(10, ge=0, description="epochs of linear warm-up")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay (none on norms, biases, positions)")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW betas"
    )
    clip_grad: float = Field(1.0, gt=0, description="largest gradient norm")
    flip: bool = Field(True, description="mirror windows at random")
    mix_groups: Positive = Field(8, description="row groups mixed with each other in a worker's buffer")
    reader_threads: Positive | None = Field(
        None, description="threads that read ahead in a worker; null: its cores, up to 8"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs that have it")
    checkpoint_every: float = Field(1, gt=0, description="epochs between checkpoints")
    keep_checkpoints: Positive = Field(2, description="checkpoints kept")
    log_every: Positive = Field(20, description="steps between logged metrics")


class Evaluate(Section):
    """What the encoder is worth: linear probe, kNN and RankMe on frozen features."""

    batch: Positive = Field(256, description="images in a forward pass")
    max_images: Positive = Field(50_000, description="train images that probes are fitted to, at most")
    probe_strengths: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.1, 1.0, 10.0), min_length=1, description="inverse regularisations tried on a held-out part of train"
    )
    knn_k: Positive = Field(20, description="neighbours of the kNN classifier")


class Tune(Section):
    """A sweep: each trial is a short pretraining with some settings changed, judged by a frozen-feature measure."""

    space: str = Field("level_weights", description="file of tune_spaces/, by name or path")
    trials: Positive = Field(8, description="number of trials")
    search: Literal["optuna", "random"] = Field("optuna", description="how the next trial is chosen")
    epochs: float = Field(5, gt=0, description="epochs of a trial")
    max_images: Positive = Field(10_000, description="train images a trial's probe is fitted to, at most")
    concurrent: Positive | None = Field(None, description="trials at once; null: one for each free CPU or GPU")


class Tracking(Section):
    """MLflow."""

    uri: str | None = Field(None, description="MLflow store; null: MLFLOW_TRACKING_URI, or SQLite in the out folder")
    experiment: str = Field("wavemim", min_length=1, description="MLflow experiment")
    system_metrics: bool = Field(True, description="log CPU, memory, disk, network and GPU")


class Cluster(Section):
    """Where it runs: a Ray cluster, or a private Ray on this machine."""

    address: str | None = Field(None, description="Ray address; null: RAY_ADDRESS, or a private Ray on this machine")
    gpus: bool | None = Field(None, description="train on GPUs; null: where the cluster has them")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of a training worker or trial")
    max_failures: int = Field(3, ge=0, description="times a lost worker group is restarted from its checkpoint")


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
    checkpoint: str | None = Field(None, description="checkpoint to use; null: the run's own last one")
    restart: bool = Field(False, description="throw away what an earlier call wrote to the same place")
    seed: int = Field(0, ge=0, description="seed of everything random")
    data: Data = Data()  # type: ignore[call-arg]
    encoder: Encoder = Encoder()  # type: ignore[call-arg]
    target: Target = Target()  # type: ignore[call-arg]
    decoder: Decoder = Decoder()  # type: ignore[call-arg]
    mask: Mask = Mask()  # type: ignore[call-arg]
    train: Train = Train()  # type: ignore[call-arg]
    evaluate: Evaluate = Evaluate()  # type: ignore[call-arg]
    tune: Tune = Tune()  # type: ignore[call-arg]
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
        """Bands predicted at every tapped level."""
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
    "tune": ("encoder", "target", "decoder", "mask", "train", "evaluate", "tune", "tracking", "cluster"),
    "export": ("tracking",),
    "run": ("data", "encoder", "target", "decoder", "mask", "train", "evaluate", "tune", "tracking", "cluster"),
}
_OPERATIONAL = {
    "train": {"checkpoint_every", "keep_checkpoints", "log_every", "reader_threads"},
    "data": {"max_rejected"},
    "tune": {"concurrent"},
    "evaluate": {"batch"},
}


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
            if key not in _OPERATIONAL.get(section, ()):
                kept[f"{section}.{key}"] = value
    return kept


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines 'key: old → new' for every setting that differs between two identities."""
    old, new = json.loads(json.dumps(dict(old))), json.loads(json.dumps(dict(new)))
    return [f"{key}: {old.get(key)} → {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def names_of(package: str, folder: str = "") -> list[str]:
    """Names of the YAML files that come with the project, of recipes or of tune spaces."""
    return sorted(entry.name[:-5] for entry in _files(package, folder).iterdir() if entry.name.endswith(".yaml"))


def _files(package: str, folder: str) -> Any:
    root = resources.files(package)
    return root / folder if folder else root


def read_yaml(name: str, package: str, folder: str, what: str) -> dict[str, Any]:
    """A YAML mapping by the name of one that comes with the project, or by a file's path."""
    try:
        if name.endswith((".yaml", ".yml")) or "/" in name:
            path = Path(name)
            if not path.is_file():
                raise SettingError(
                    f"{what} '{name}': no such file; give another YAML file, or one of {', '.join(names_of(package, folder))}"
                )
            text = path.read_text(encoding="utf-8")
        else:
            known = names_of(package, folder)
            if name not in known:
                raise SettingError(
                    f"{what} '{name}' is not known{_nearest(name, known, '')}; give one of {', '.join(known)}, or a YAML file"
                )
            text = (_files(package, folder) / f"{name}.yaml").read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingError(f"{what} '{name}' is not valid YAML: {' '.join(str(error).split())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{what} '{name}' cannot be read: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingError(f"{what} '{name}' holds {type(content).__name__}, not a mapping of settings")
    return content


def load(recipe: str = DEFAULT_RECIPE, overrides: Iterable[str] = (), *, data_only: bool = False) -> Recipe:
    """Settings of `recipe` with `overrides` ("key=value", values in YAML). Raises SettingError.

    With `data_only` it does not matter whether they go together with the encoder, for those who only prepare.
    """
    settings = _with_bases(recipe, ())
    settings.setdefault("name", Path(recipe).name.removesuffix(".yaml").removesuffix(".yml"))
    for override in overrides:
        _apply(settings, override)
    return validate(settings, data_only=data_only)


def validate(settings: Mapping[str, Any], *, data_only: bool = False) -> Recipe:
    """A checked `Recipe` from nested settings, as of `load`. Raises SettingError naming the first thing that is wrong."""
    try:
        recipe = Recipe.model_validate(dict(settings))
    except ValidationError as error:
        raise SettingError(_explain(error)) from None
    _check_data(recipe.data)
    if not data_only:
        _check_together(recipe)
    for key in ("images", "shards", "out"):
        if re.match(
            r"[^:/]+://([^?]*:[^?]*@|.*[?&][^=]*(secret|token|password|key)[^=]*=)", getattr(recipe, key) or ""
        ):
            raise SettingError(
                f"{key}: a URL with credentials would end up in logs and records; give them in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://)"
            )
    if "://" in recipe.out:
        raise SettingError(
            f"out={recipe.out}: checkpoints and reports go to a folder that all nodes see; "
            "only shards= may be in an object store"
        )
    if Path(recipe.out).is_file():
        raise SettingError(f"out={recipe.out}: a file, not a folder")
    return recipe


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """A copy of `recipe` with dotted keys set to values, checked anew."""
    settings = recipe.dump()
    for key, value in overrides.items():
        _set(settings, key, value)
    return validate(settings)


def _with_bases(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name in seen:
        raise SettingError(f"recipe '{name}' is based on itself: {' → '.join((*seen, name))}")
    if name.endswith((".yaml", ".yml")) and seen and not Path(name).is_absolute():
        name = str(Path(seen[-1]).parent / name)  # a base is meant beside the recipe that names it
    settings = read_yaml(name, "pipeline", "recipes", "recipe")
    base = settings.pop("base", None)
    if base is None:
        return settings
    merged = _with_bases(str(base), (*seen, name))
    merged.pop("name", None)
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = {**merged[key], **value}
        else:
            merged[key] = value
    return merged


def _apply(settings: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise SettingError(f"'{override}' is not a setting; write key=value, for example train.epochs=10")
    if _is_text(key.strip()) and text.strip() not in ("", "null"):
        _set(settings, key.strip(), text.strip())  # name=007, images=2024: a text stays as it was typed
        return
    try:
        value = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        value = _number_like(value)
    _set(settings, key.strip(), value)


def _is_text(dotted: str) -> bool:
    kinds = {key: kind for key, kind, _ in settings_of()}
    return kinds.get(dotted, "").partition("|")[0] == "text"


def _number_like(text: str) -> Any:
    """YAML 1.1 reads 1e-4 as a string; a person means the number."""
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _set(settings: dict[str, Any], dotted: str, value: Any) -> None:
    model: Any = Recipe
    place = settings
    *path, last = dotted.split(".")
    for part in path:
        model = _field_model(model, part, dotted)
        inner = place.get(part)
        place[part] = dict(inner) if isinstance(inner, dict) else {}
        place = place[part]
    if isinstance(model, type) and issubclass(model, BaseModel):
        _known_key(model, last, dotted)
        place[last] = value
        return
    if not last.isdigit():
        raise SettingError(f"{dotted}={value}: '{last}' is not a level; levels are whole numbers from 1")
    # Mappings are keyed by level, a number: YAML gives 3, JSON "3"; pydantic takes both.
    for key in [key for key in place if str(key) == last]:
        del place[key]
    place[last] = value


def _known_key(model: type[BaseModel], key: str, dotted: str) -> None:
    if key not in model.model_fields:
        prefix = dotted.rpartition(".")[0]
        known = [f"{prefix}.{name}" if prefix else name for name in model.model_fields]
        everywhere = [key_ for key_, _, _ in settings_of()]
        raise SettingError(f"unknown setting '{dotted}'{_nearest(dotted, [*known, *everywhere])}")


def _field_model(model: Any, part: str, dotted: str) -> Any:
    if isinstance(model, type) and issubclass(model, BaseModel):
        if part not in model.model_fields:
            raise SettingError(f"unknown setting '{dotted}'{_nearest(dotted, [key for key, _, _ in settings_of()])}")
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        if typing.get_origin(annotation) is dict:
            return dict
    raise SettingError(f"'{dotted}': '{part}' is a value and has no settings inside; see wavemim run --help")


def settings_of(sections: Iterable[str] | None = None) -> Iterator[tuple[str, str, Any]]:
    """All settings as (dotted key, type in words, pydantic field), those outside of sections first."""
    for name, field in Recipe.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            yield name, type_in_words(field.annotation), field
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if sections is not None and name not in sections:
                continue
            for inner, inner_field in field.annotation.model_fields.items():
                yield f"{name}.{inner}", type_in_words(inner_field.annotation), inner_field


def type_in_words(annotation: Any) -> str:
    """A type as a person reads it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_in_words(arguments[0])
    if origin is Literal:
        return "|".join(str(a) for a in arguments)
    if origin is dict:
        return f"{{level: {type_in_words(arguments[1])}}}"
    if origin is tuple:
        return f"[{type_in_words(arguments[0])}, ...]"
    if arguments:
        return "|".join("null" if a is type(None) else type_in_words(a) for a in arguments)
    return {"str": "text"}.get(getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation)))


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        return f"unknown setting '{key}'{_nearest(key, [k for k, _, _ in settings_of()])}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "string_pattern_mismatch" and ".bands" in f".{key}":
        message = "allowed are some of the letters A, H, V, D, in this order"
    elif key == "name":
        message = "allowed are letters, digits, '.', '_' and '-', beginning with a letter or digit"
    return f"{key}={value}: {message}"


def _check_together(recipe: Recipe) -> None:
    """What pydantic cannot see in one field: settings that do not go together."""
    data, encoder, target = recipe.data, recipe.encoder, recipe.target
    _check_side("encoder.image_size", encoder.image_size, data.levels)
    if encoder.image_size % encoder.patch_size:
        near = _nearest_multiple(encoder.image_size, encoder.patch_size)
        raise SettingError(
            f"encoder.image_size={encoder.image_size}: no multiple of encoder.patch_size={encoder.patch_size}; "
            f"nearest allowed: {near}"
        )
    if encoder.image_size > data.image_size:
        raise SettingError(
            f"encoder.image_size={encoder.image_size}: larger than the stored images, data.image_size={data.image_size}; "
            "make it smaller or store larger images"
        )
    for level in target.taps:
        if level > data.levels:
            raise SettingError(
                f"target.taps.{level}: level {level} is deeper than the stored pyramid, data.levels={data.levels}; "
                f"allowed are 1 to {data.levels}"
            )
        cell = 2**level
        if encoder.patch_size % cell and cell % encoder.patch_size:
            raise SettingError(
                f"target.taps.{level}: cells of {cell} pixels and patches of encoder.patch_size={encoder.patch_size} "
                "pixels do not divide each other; use a patch size that is a power of two"
            )
        if cell > encoder.patch_size and (encoder.image_size // encoder.patch_size) % (cell // encoder.patch_size):
            raise SettingError(
                f"target.taps.{level}: cells of {cell} pixels do not divide encoder.image_size={encoder.image_size}"
            )
    for key, named in (("weights", target.weights), ("bands", target.bands)):
        for level in named:
            if level not in target.taps:
                taps = ", ".join(str(tap) for tap in sorted(target.taps))
                raise SettingError(f"target.{key}.{level}: level {level} has no tap; target.taps names levels {taps}")
    if not any(recipe.weights_by_level().values()):
        raise SettingError("target.weights: every level weighs 0, so nothing is trained; give one a weight above 0")
    patches = (encoder.image_size // encoder.patch_size) ** 2
    hidden = round(patches * recipe.mask.ratio)
    if not 0 < hidden < patches:
        raise SettingError(
            f"mask.ratio={recipe.mask.ratio}: hides {hidden} of {patches} patches; at least one has to be hidden and one seen"
        )
    if recipe.decoder.width % recipe.decoder.heads or recipe.decoder.width % 4:
        raise SettingError(
            f"decoder.width={recipe.decoder.width}: has to be a multiple of 4 and of decoder.heads={recipe.decoder.heads}"
        )
    if recipe.train.batch % recipe.train.workers:
        near = _nearest_multiple(recipe.train.batch, recipe.train.workers)
        raise SettingError(
            f"train.batch={recipe.train.batch}: no multiple of train.workers={recipe.train.workers}; nearest allowed: {near}"
        )
    if recipe.train.warmup_epochs >= recipe.train.epochs:
        raise SettingError(
            f"train.warmup_epochs={recipe.train.warmup_epochs:g}: has to be less than train.epochs={recipe.train.epochs:g}; "
            f"set train.warmup_epochs={recipe.train.epochs / 10:g}, for example"
        )


def _check_side(key: str, size: int, levels: int) -> None:
    unit = 2**levels
    if size % unit:
        raise SettingError(
            f"{key}={size}: no multiple of 2^levels = {unit} (data.levels={levels}); "
            f"nearest allowed: {_nearest_multiple(size, unit)}"
        )


def _check_data(data: Data) -> None:
    _check_side("data.image_size", data.image_size, data.levels)
    if data.wavelet != "haar":
        import pywt  # not needed for most commands

        known = pywt.wavelist(kind="discrete")
        if data.wavelet not in known:
            raise SettingError(
                f"data.wavelet={data.wavelet}: no discrete wavelet of PyWavelets"
                f"{_nearest(data.wavelet, known, '')}; allowed are {', '.join(pywt.families(short=True)[:7])} with their "
                "orders, such as db4, sym8 or bior2.2"
            )
        if data.steps == "lossless":
            raise SettingError(
                f"data.steps=lossless: other wavelets than haar have no exact integers (data.wavelet={data.wavelet}); "
                "give steps as numbers, such as [0.5]"
            )
    if data.value_range is not None and data.value_range[0] >= data.value_range[1]:
        raise SettingError(f"data.value_range={list(data.value_range)}: the first value has to be below the second")


def _nearest_multiple(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _nearest(name: str, known: Iterable[str], otherwise: str = "; --help lists the settings") -> str:
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:  # a right name at a wrong place: "epochs" for "train.epochs"
        near = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean '{near[0]}'?" if near else otherwise
