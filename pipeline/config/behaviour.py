"""Properties of a setting, declared at its field: which stages read it, and whether it may be searched or changed.

`setting` declares a field, `section` a group of fields. What a field does not declare, it inherits from its section. Everything
that depends on these properties (identities of stages, sweeps, ``force=true``, comparisons, model cards) derives its list
of settings from `behaviours`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

STAGES = ("prepare", "pretrain", "evaluate", "finetune", "segment", "tune", "export", "run")
_KEY = "behaviour"  # in a field's JSON schema


@dataclass(frozen=True)
class Behaviour:
    """The properties of one setting."""

    stages: tuple[str, ...] = STAGES  # stages that read it
    identity: tuple[str, ...] = ()  # stages whose result it decides: it is part of what identifies their work
    operational: bool = False  # decides only how and where a stage computes, so it is part of no identity
    searchable: bool = False  # a sweep may vary it
    resumable: bool = False  # may change when pretraining resumes with force=true
    compared: bool = True  # shown by `wavemim compare` where it differs
    in_card: bool = False  # shown in the model card of an exported encoder
    place: bool = False  # the value is a path or a URL
    vit_only: bool = False  # applies to plain ViTs only
    added: bool = False  # younger than some out folders: at its default it is part of no identity


def setting(
    default: Any,
    description: str,
    *,
    stages: Sequence[str] | None = None,
    identity: Sequence[str] | None = None,
    operational: bool | None = None,
    searchable: bool | None = None,
    resumable: bool | None = None,
    compared: bool | None = None,
    in_card: bool | None = None,
    place: bool | None = None,
    vit_only: bool | None = None,
    added: bool | None = None,
    **limits: Any,
) -> Any:
    """Declare a setting.

    Args:
        default: Its default value.
        description: Its meaning, for ``--help`` and the settings reference.
        stages: Stages that read it. None, here and below: as its section says.
        identity: Stages whose result depends on it. Default: all stages that read it; none if it is operational.
        operational: Whether it only affects how and where a stage computes. Such settings are never searchable.
        searchable: Whether a sweep may vary it.
        resumable: Whether it may change when pretraining resumes with ``force=true``.
        compared: Whether ``wavemim compare`` shows it where it differs.
        in_card: Whether the model card shows it.
        place: Whether its value is a path or a URL. Model cards then show its last part only.
        vit_only: Whether it applies to plain ViTs only.
        added: Whether it is newer than some existing out folders, which lack it: at its default value it is then not
            part of any identity.
        limits: Limits of the value as in ``pydantic.Field``: ge, gt, le, lt, min_length, pattern.

    Returns:
        The pydantic field.
    """
    declared: dict[str, Any] = {
        "stages": None if stages is None else list(stages),
        "identity": None if identity is None else list(identity),
        "operational": operational,
        "searchable": searchable,
        "resumable": resumable,
        "compared": compared,
        "in_card": in_card,
        "place": place,
        "vit_only": vit_only,
        "added": added,
    }
    known: dict[str, Any] = {key: value for key, value in declared.items() if value is not None}
    return Field(default, description=description, json_schema_extra={_KEY: known}, **limits)


def section(model: type[BaseModel], *, stages: Sequence[str], **properties: Any) -> Any:
    """Declare a group of settings; `properties` (as of `setting`) hold for each of them that does not say otherwise.

    Args:
        model: The group.
        stages: Stages that read it and list it in their ``--help``.
        properties: Properties of a `Behaviour`.

    Returns:
        The pydantic field, with the group's defaults.
    """
    return setting(model(), (model.__doc__ or "").partition("\n")[0], stages=stages, **properties)


def is_section(field: FieldInfo) -> bool:
    """Whether a field holds a group of settings."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def section_behaviours(model: type[BaseModel]) -> dict[str, Behaviour]:
    """What each section of `model` declares for its settings, by the section's name."""
    return {name: _resolved(_declared(field)) for name, field in model.model_fields.items() if is_section(field)}


def behaviours(model: type[BaseModel]) -> dict[str, Behaviour]:
    """The behaviour of every setting of `model` by its dotted key, in the order of the fields."""
    found = {}
    for name, field in model.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None:
            found[name] = _resolved(_declared(field))
            continue
        for key, inner_field in inner.items():
            found[f"{name}.{key}"] = _resolved({**_declared(field), **_declared(inner_field)})
    return found


def values_of(settings: BaseModel) -> dict[str, Any]:
    """The value of every setting as a plain JSON value, by its dotted key, in the order of the fields."""
    found: dict[str, Any] = {}
    values = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        if is_section(field):
            found |= {f"{name}.{key}": value for key, value in values[name].items()}
        else:
            found[name] = values[name]
    return found


def _declared(field: FieldInfo) -> Mapping[str, Any]:
    extra = field.json_schema_extra
    known = extra.get(_KEY, {}) if isinstance(extra, dict) else {}
    assert isinstance(known, dict)
    return known


def _resolved(declared: Mapping[str, Any]) -> Behaviour:
    """A behaviour from what was declared: operational settings are part of no identity, and not searchable."""
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in declared.items()
    }
    made = Behaviour(**values)
    if made.operational:
        return dataclasses.replace(made, identity=(), searchable=False)
    return made if "identity" in declared else dataclasses.replace(made, identity=made.stages)
