"""Loads and checks settings.

A *recipe* is a YAML file. The settings of a run are a recipe (and the recipes it is based on), then ``key=value`` overrides.
`load` merges and validates them and returns one frozen `Recipe`. Mistakes become a `SettingError` of one line.
"""

from __future__ import annotations

import logging
import operator
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.behaviour import is_section
from pipeline.config.checks import check_data, check_kind, check_out, check_together, nearest
from pipeline.config.follow import BY_KIND, WARM_UPS, WEIGHTS, following
from pipeline.config.places import check_place, check_text, local_place
from pipeline.config.recipe import BEHAVIOURS, STAGE_SECTIONS, Recipe, differences, identity
from pipeline.config.settings import number_like
from pipeline.config.yaml_files import DuplicateKeyError, names_of, parse_yaml, read_yaml
from pipeline.errors import SettingError
from wavemim.registry import is_file

__all__ = [
    "DEFAULT_RECIPE",
    "STAGE_SECTIONS",
    "Recipe",
    "SettingError",
    "check_key",
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
# Settings that are, or may be, paths.
_PLACES = (*(key for key, behaviour in BEHAVIOURS.items() if behaviour.place), "segment.classes", "tune.space")
_CREDENTIALS = re.compile(r"[^:/]+://([^?]*:[^?]*@|.*[?&][^=]*(secret|token|passw|pwd|key)[^=]*=)", re.IGNORECASE)
_log = logging.getLogger(__name__)


def load(recipe: str = DEFAULT_RECIPE, overrides: Iterable[str] = (), *, data_only: bool = False) -> Recipe:
    """Load the settings of a run. Settings that follow those that were given (`follow`) are named in a warning.

    Args:
        recipe: Name of a recipe, or path of a YAML file.
        overrides: Texts KEY=VALUE with values in YAML; later ones win.
        data_only: Do not check whether the data fit the encoder, for runs that only prepare a shard set.

    Returns:
        The settings, validated.

    Raises:
        SettingError: If a setting is unknown, has a value that is not allowed, or is incompatible with others.
    """
    given: set[str] = set()
    settings = _with_bases(recipe, (), given)
    settings.setdefault("name", _name_of(recipe))
    for override in overrides:
        given.add(_apply(settings, override))
    settings = _with_local_places(settings)
    _check_no_password(settings.get("tracking"))
    encoder = settings.get("encoder")
    if isinstance(encoder, dict) and isinstance(encoder.get("pretrained"), str):  # workers run in other folders
        encoder["pretrained"] = str(Path(encoder["pretrained"]).expanduser().absolute())
    target = settings.get("target")
    if isinstance(target, dict) and isinstance(target.get("module"), str) and is_file(target["module"]):
        target["module"] = str(Path(target["module"]).expanduser().absolute())
    changes, words = following(_parsed(settings), given, given)
    for key, value in changes.items():
        _set(settings, key, value)
    loaded = validate(settings, data_only=data_only).with_given(given)
    if words:
        _log.warning("%s", "; ".join(words))
    return loaded


def _parsed(settings: Mapping[str, Any]) -> Recipe:
    settings = _with_local_places(settings)
    _check_numbers(settings)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise SettingError(_explain(error)) from None


def validate(settings: Mapping[str, Any], *, data_only: bool = False) -> Recipe:
    """Check nested settings.

    Args:
        settings: All settings, nested by section.
        data_only: As for `load`.

    Returns:
        The settings, validated.

    Raises:
        SettingError: Naming the first mistake.
    """
    recipe = _parsed(settings)
    check_data(recipe.data)
    check_kind(recipe.target)
    if not data_only:
        check_together(recipe)
    for key, place in _places(recipe):
        check_place(f"{key}={place}", place)
        if _CREDENTIALS.match(place):
            raise SettingError(
                f"{key}: a URL with credentials would end up in logs and records; give them in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://)"
            )
    check_out(recipe)
    return recipe


def _check_no_password(tracking: Any) -> None:
    """Raise SettingError where tracking.uri contains a password: settings are kept with every run and checkpoint."""
    uri = tracking.get("uri") if isinstance(tracking, Mapping) else None
    if isinstance(uri, str) and not uri.startswith("sqlite") and _CREDENTIALS.match(uri):
        raise SettingError(
            "tracking.uri: a URI with a password would end up in logs and records; set it as MLFLOW_TRACKING_URI in the "
            "environment instead, or give it without the password and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD"
        )


def _check_numbers(settings: Mapping[str, Any]) -> None:
    """Raise SettingError where true or false is given for a number; pydantic would read them as 1 and 0."""
    for key, kind, _ in settings_of():
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, bool) and {"int", "float"} & set(kind.split("|")) and "bool" not in kind:
            raise SettingError(f"{key}={str(value).lower()}: needs a number")


def _places(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Paths and URLs among the settings, by key."""
    for key in _PLACES:
        value = operator.attrgetter(key)(recipe)
        for place in value if isinstance(value, tuple) else (value,):
            if isinstance(place, str):
                yield key, place


def _with_local_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the paths of ``file://`` URLs in their place."""
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for key in _PLACES:
        section, _, last = key.rpartition(".")
        group = settings.get(section) if section else settings
        place = group.get(last) if isinstance(group, dict) else None
        if isinstance(group, dict) and isinstance(place, str):
            group[last] = local_place(place)
        elif isinstance(group, dict) and isinstance(place, list | tuple):
            group[last] = [local_place(name) if isinstance(name, str) else name for name in place]
    return settings


def _name_of(recipe: str) -> str:
    """The default name of a run, that of its recipe, with other characters than a name may have replaced by "-"."""
    stem = Path(local_place(recipe)).name.removesuffix(".yaml").removesuffix(".yml")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "run"


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """A copy of `recipe` with dotted keys set to new values, validated again.

    A new length of training shortens a warm-up that the user did not give, and a new kind of target takes a normalisation and a
    tilt that it has. A level that new taps leave out loses its weight, also one that the user gave: it is for the taps of that
    level. Raises SettingError.
    """
    settings, given = recipe.dump(), recipe.given | overrides.keys()
    for key, value in overrides.items():
        _set(settings, key, value)
    parsed = _parsed(settings)
    followers = (
        following(parsed, overrides, given, (*WARM_UPS, *BY_KIND))[0]
        | following(parsed, overrides, overrides, (WEIGHTS,))[0]
    )
    for key, value in followers.items():
        _set(settings, key, value)
    return validate(settings).with_given(given)


def check_key(key: str) -> None:
    """Raise SettingError, with the nearest name, unless a dotted key names a setting or an entry of a mapping."""
    _set({}, key, "…")


def _with_bases(name: str, seen: tuple[str, ...], given: set[str]) -> dict[str, Any]:
    """The settings of a recipe and of those that it is based on. Keys of those in files are added to `given`."""
    if name in seen:
        raise SettingError(f"recipe '{name}' is based on itself: {' → '.join((*seen, name))}")
    name = local_place(name)
    if name.endswith((".yaml", ".yml")) and seen and not Path(name).is_absolute():
        name = str(Path(seen[-1]).parent / name)  # relative to the recipe that names it
    settings = read_yaml(name, "pipeline", "recipes", "recipe")
    dotted = _dotted(settings, name)
    base = settings.pop("base", None)
    if name.endswith((".yaml", ".yml")):  # of one's own
        given.update(dotted)
        for key, value in settings.items():
            given.update(f"{key}.{inner}" for inner in value) if isinstance(value, dict) else given.add(key)
    merged = settings if base is None else _with_bases(str(base), (*seen, name), given)
    if base is not None:
        merged.pop("name", None)
        for key, value in settings.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = {**merged[key], **value}
            else:
                merged[key] = value
    for key, value in dotted.items():
        _set(merged, key, value)
    return merged


def _dotted(settings: dict[str, Any], recipe: str) -> dict[str, Any]:
    """Take keys such as train.epochs out of a recipe: they mean what they mean on the command line."""
    taken = {key: settings.pop(key) for key in list(settings) if isinstance(key, str) and "." in key}
    for section, inner in settings.items():
        if isinstance(inner, dict):
            with_dots = [key for key in inner if isinstance(key, str) and "." in key]
            taken |= {f"{section}.{key}": inner.pop(key) for key in with_dots}
    for key in taken:
        place: Any = settings
        for part in key.split("."):
            names = {str(name): name for name in place} if isinstance(place, dict) else {}
            place = place[names[part]] if part in names else None
        if place is not None:
            raise SettingError(
                f"recipe '{recipe}': '{key}' is given twice, as a key with dots and in a section; give it once"
            )
    return taken


def _apply(settings: dict[str, Any], override: str) -> str:
    """Set what a text KEY=VALUE says; returns the key."""
    check_text(override, override)
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise SettingError(f"'{override}' is not a setting; write key=value, for example train.epochs=10")
    if _is_text(key.strip()) and text.strip() not in ("", "null"):
        _set(settings, key.strip(), text.strip())  # name=007, images=2024: texts stay as they were typed
        return key.strip()
    # YAML would read 3:6 as a number of base 60, and reg_tokens:4 as one name.
    if re.search(r"[{,]\s*\w+:[^\s/]", text):
        raise SettingError(f"{override}: write a space after each colon, for example {{3: 6, 4: 8}}")
    try:
        value = parse_yaml(text) if text.strip() else None
    except yaml.YAMLError:
        value = text
    except DuplicateKeyError as error:
        raise SettingError(f"{override}: {error}; give it once") from None
    if isinstance(value, str):
        value = number_like(value)
    _set(settings, key.strip(), value)
    return key.strip()


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
    if model is str:  # a mapping whose keys are names of arguments
        place[last] = value
        return
    if not last.isdigit():
        raise SettingError(f"{dotted}={value}: '{last}' is not a level; levels are whole numbers from 1")
    # Mappings are keyed by level, a number: YAML gives 3, JSON "3"; pydantic takes both.
    for key in [key for key in place if str(key) == last]:
        del place[key]
    place[last] = value


def _unknown(key: str, known: Iterable[str] = ()) -> SettingError:
    return SettingError(f"unknown setting '{key}'{nearest(key, [*known, *(name for name, _, _ in settings_of())])}")


def _known_key(model: type[BaseModel], key: str, dotted: str) -> None:
    if key not in model.model_fields:
        prefix = dotted.rpartition(".")[0]
        known = [f"{prefix}.{name}" if prefix else name for name in model.model_fields]
        raise _unknown(dotted, known)


def _field_model(model: Any, part: str, dotted: str) -> Any:
    if isinstance(model, type) and issubclass(model, BaseModel):
        if part not in model.model_fields:
            raise _unknown(dotted)
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        if typing.get_origin(annotation) is dict:
            return typing.get_args(annotation)[0]  # the type of its keys
    raise SettingError(f"'{dotted}': '{part}' is a single value, not a group of settings; see wavemim run --help")


def settings_of(stage: str | None = None) -> Iterator[tuple[str, str, Any]]:
    """List settings.

    Args:
        stage: List the settings that this stage reads; None for all. Those outside of sections come first.

    Yields:
        (dotted key, type as text, pydantic field) of each setting.
    """
    fields: list[tuple[str, Any]] = []
    for name, field in Recipe.model_fields.items():
        if not is_section(field):
            fields.append((name, field))
    for name, field in Recipe.model_fields.items():
        if is_section(field):
            section: Any = field.annotation
            fields += [(f"{name}.{inner}", inner_field) for inner, inner_field in section.model_fields.items()]
    for key, field in fields:
        if stage is None or stage in BEHAVIOURS[key].stages:
            yield key, type_in_words(field.annotation), field


def type_in_words(annotation: Any) -> str:
    """The type of a setting as `--help` shows it, such as text|null or {level: int}."""
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
        return str(_unknown(key, () if "." in key else Recipe.model_fields))
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return (
            f"{key}={'null' if value is None else value}: needs a mapping of settings, such as {key}: {{NAME: VALUE}}"
        )
    if first["type"] == "invalid_key":
        return f"'{value}' is not the name of a setting; --help lists them"
    if first["type"] == "string_type" and value is not None:
        return f"{key}={value}: needs a text; put it in quotes, as in {key}: '{value}'"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "tuple_type":
        message = "input should be a list, such as [A, B]"
    if first["type"] == "string_pattern_mismatch" and ".bands" in f".{key}":
        message = "must be some of the letters A, H, V, D, in this order"
    elif key == "name":
        message = "must consist of letters, digits, '.', '_' and '-', and start with a letter or digit"
    return f"{key}={value}: {message}"
