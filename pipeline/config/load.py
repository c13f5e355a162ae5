"""The typed configuration: the one door through which settings come in.

A *recipe* is a YAML file. A run's settings are a recipe (and the recipes it is based on), then ``key=value`` overrides;
`load` joins and checks them and gives back one frozen `Recipe`. What is wrong becomes a `SettingError`, one line.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.checks import check_data, check_kind, check_together, nearest
from pipeline.config.recipe import STAGE_SECTIONS, Recipe, differences, identity
from pipeline.config.settings import number_like
from pipeline.errors import SettingError
from wavemim.registry import is_file

__all__ = [
    "DEFAULT_RECIPE",
    "STAGE_SECTIONS",
    "Recipe",
    "SettingError",
    "differences",
    "identity",
    "load",
    "names_of",
    "read_yaml",
    "settings_of",
    "type_in_words",
    "validate",
    "with_overrides",
]

DEFAULT_RECIPE = "small"


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
                    f"{what} '{name}' is not known{nearest(name, known, '')}; give one of {', '.join(known)}, or a YAML file"
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
    encoder = settings.get("encoder")
    if isinstance(encoder, dict) and isinstance(encoder.get("pretrained"), str):  # workers are in other folders
        encoder["pretrained"] = str(Path(encoder["pretrained"]).expanduser().absolute())
    target = settings.get("target")
    if isinstance(target, dict) and isinstance(target.get("module"), str) and is_file(target["module"]):
        target["module"] = str(Path(target["module"]).expanduser().absolute())
    return validate(settings, data_only=data_only)


def validate(settings: Mapping[str, Any], *, data_only: bool = False) -> Recipe:
    """A checked `Recipe` from nested settings, as of `load`. Raises SettingError naming the first thing that is wrong."""
    try:
        recipe = Recipe.model_validate(dict(settings))
    except ValidationError as error:
        raise SettingError(_explain(error)) from None
    check_data(recipe.data)
    check_kind(recipe.target)
    if not data_only:
        check_together(recipe)
    places = {key: getattr(recipe, key) for key in ("images", "shards", "out", "checkpoint")}
    places |= {"train.checkpoints_at": recipe.train.checkpoints_at}
    places |= {"segment.images": recipe.segment.images, "segment.masks": recipe.segment.masks}
    for key, place in places.items():
        if re.match(r"[^:/]+://([^?]*:[^?]*@|.*[?&][^=]*(secret|token|password|key)[^=]*=)", place or ""):
            raise SettingError(
                f"{key}: a URL with credentials would end up in logs and records; give them in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://)"
            )
    if "://" in recipe.out:
        raise SettingError(
            f"out={recipe.out}: checkpoints and reports go to a folder that all nodes see; only shards= may be in an object "
            "store, and copies of checkpoints (train.checkpoints_at=)"
        )
    if Path(recipe.out).is_file():
        raise SettingError(f"out={recipe.out}: a file, not a folder")
    copies = recipe.train.checkpoints_at
    if copies is not None and "://" not in copies:
        if Path(copies).expanduser().resolve() == recipe.run_dir.parent.resolve():
            raise SettingError(f"train.checkpoints_at={copies}: the run's own folder; give another place")
        if not copies or Path(copies).expanduser().is_file():
            raise SettingError(f"train.checkpoints_at={copies}: no folder; give one, or a URL such as s3://BUCKET/RUNS")
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
    if re.search(
        r"[{,]\s*\w+:[^\s/]", text
    ):  # YAML would read 3:6 as a number of base 60, and reg_tokens:4 as one name
        raise SettingError(f"{override}: write a space after each colon, for example {{3: 6, 4: 8}}")
    try:
        value = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        value = number_like(value)
    _set(settings, key.strip(), value)


def _is_text(dotted: str) -> bool:
    kinds = {key: kind for key, kind, _ in settings_of()}
    return kinds.get(dotted, "").partition("|")[0] == "text"


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
    if dotted.startswith(("encoder.options.", "target.options.")):  # keyed by names of arguments
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
        raise SettingError(f"unknown setting '{dotted}'{nearest(dotted, [*known, *everywhere])}")


def _field_model(model: Any, part: str, dotted: str) -> Any:
    if isinstance(model, type) and issubclass(model, BaseModel):
        if part not in model.model_fields:
            raise SettingError(f"unknown setting '{dotted}'{nearest(dotted, [key for key, _, _ in settings_of()])}")
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
        key = "name" if arguments[0] is str else "level"
        return f"{{{key}: {type_in_words(arguments[1])}}}"
    if origin is tuple:
        return f"[{type_in_words(arguments[0])}, ...]"
    if arguments:
        return "|".join("null" if a is type(None) else type_in_words(a) for a in arguments)
    return {"str": "text", "Any": "value"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if part not in ("[key]", "constrained-int"))
    value = first.get("input")
    if first["type"] == "extra_forbidden":
        return f"unknown setting '{key}'{nearest(key, [k for k, _, _ in settings_of()])}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "tuple_type":
        message = "input should be a list, such as [A, B]"
    if first["type"] == "string_pattern_mismatch" and ".bands" in f".{key}":
        message = "allowed are some of the letters A, H, V, D, in this order"
    elif key == "name":
        message = "allowed are letters, digits, '.', '_' and '-', beginning with a letter or digit"
    return f"{key}={value}: {message}"
