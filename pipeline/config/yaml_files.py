"""Reads YAML files: recipes and search spaces, those of the project or others by their paths."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.checks import nearest
from pipeline.config.places import check_place, local_place
from pipeline.errors import SettingError


def names_of(package: str, folder: str = "") -> list[str]:
    """Names of the YAML files in a folder of a package, such as recipes or search spaces."""
    return sorted(entry.name[:-5] for entry in _files(package, folder).iterdir() if entry.name.endswith(".yaml"))


def _files(package: str, folder: str) -> Any:
    root = resources.files(package)
    return root / folder if folder else root


def read_yaml(name: str, package: str, folder: str, what: str) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        name: Name of a file that comes with the project, or the path of another one.
        package: Package of the files that come with the project.
        folder: Their folder in it.
        what: What the file is, for messages.

    Returns:
        The mapping.

    Raises:
        SettingError: If there is no such file, it cannot be read, is no mapping, or has a key twice.
    """
    name = local_place(name)
    check_place(f"{what} '{name}'", name)
    try:
        known = names_of(package, folder)
        if name.endswith((".yaml", ".yml")) or "/" in name or (name not in known and Path(name).is_file()):
            path = Path(name)
            if not path.is_file():
                raise SettingError(
                    f"{what} '{name}': no such file; give another YAML file, or one of {', '.join(known)}"
                )
            text = path.read_text(encoding="utf-8")
        else:
            if name not in known:
                raise SettingError(
                    f"{what} '{name}' is not known{nearest(name, known, '')}; give one of {', '.join(known)}, or a YAML file"
                )
            text = (_files(package, folder) / f"{name}.yaml").read_text(encoding="utf-8")
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        raise SettingError(f"{what} '{name}' is not valid YAML: {_mistake(error)}") from None
    except DuplicateKeyError as error:
        raise SettingError(f"{what} '{name}': {error}; give it once") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{what} '{name}' cannot be read: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingError(f"{what} '{name}' contains a {type(content).__name__}, not a mapping of settings")
    return content


def _mistake(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split()).replace(' in "<unicode string>",', ",")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars. In YAML 1.1, as PyYAML has it, 010 is 8, 1:30 is 90, on and no are booleans.

    1e-4 stays a text, which settings take for a number: a name may be 12e4.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012  # of the base class


for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", "~nN\0"),
    ("int", "[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
):
    _firsts = [sign if sign != "\0" else "" for sign in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _firsts)


class DuplicateKeyError(ValueError):
    """A key that is in a mapping twice."""


def parse_yaml(text: str) -> Any:
    """The content of a YAML text. Raises DuplicateKeyError where YAML itself would drop the first of two values."""
    root = yaml.compose(text, Loader=_Loader)
    waiting, seen = [("", root)], set()
    while waiting:
        path, node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{path}{index}.", item) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if key.tag == "tag:yaml.org,2002:int":  # 0x1 is 1
                name = str(int(name, 0))
            if name in lines and name not in ("", "<<"):
                where = f"line {line}" if lines[name] == line else f"lines {lines[name]} and {line}"
                raise DuplicateKeyError(f"'{path}{name}' is given twice ({where})")
            lines[name] = line
            waiting.append((f"{path}{name}.", value))
    return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
