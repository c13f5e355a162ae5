"""The registry of prediction targets: the names that a recipe's `target.kind` may take.

A target is registered by a decorator, the built-in ones and those of users alike::

    @register_target("edges")
    class EdgeTarget(Target): ...

This module imports no torch, so that settings can be checked quickly: the classes of the built-in targets are imported
when one is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from wavemim.targets.base import Target

    T = TypeVar("T", bound=type[Target])

BUILT_IN = ("wavelet", "pixels", "hog", "fourier")

_classes: dict[str, type[Target]] = {}
_origins: dict[str, tuple[str, str]] = {}  # name → file (or module, where that has none) and name of the class


def register_target(name: str) -> Callable[[T], T]:
    """Class decorator that adds a target which recipes can name: `target.kind=NAME`.

    The class derives from `wavemim.targets.Target`. Its constructor takes what `Target` takes; further keyword
    arguments are set by `target.options`. Defining the same class again, as a notebook cell does that is run twice,
    replaces it.

    Args:
        name: Lower-case letters, digits and underscores, beginning with a letter.

    Returns:
        The decorator, which returns the class unchanged.

    Raises:
        ValueError: If the name is malformed, or another class has it already.
        TypeError: If the decorated object is not a subclass of `Target`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            f"register_target({name!r}): a name has lower-case letters, digits and underscores and begins with a letter"
        )

    def register(cls: T) -> T:
        from wavemim.targets.base import Target

        if not (isinstance(cls, type) and issubclass(cls, Target)):
            raise TypeError(f"register_target({name!r}): {cls!r} is not a subclass of wavemim.targets.Target")
        origin = _origin(cls)
        file, qualified = _origins.setdefault(name, origin)
        if (file, qualified) != origin:
            raise ValueError(
                f"register_target({name!r}): the name is taken by {qualified} of {file}; choose another one"
            )
        _classes[name] = cls
        return cls

    return register


def known_targets() -> list[str]:
    """The names that can be used now: the built-in targets, then those registered since, in alphabetical order."""
    return [*BUILT_IN, *sorted(set(_classes) - set(BUILT_IN))]


def target_class(name: str, module: str | None = None) -> type[Target]:
    """The class of a target.

    Args:
        name: A registered name.
        module: What registers it, as of `load_module`; None for built-in targets and those registered already.

    Raises:
        ValueError: If the module cannot be imported, or no target has the name.
    """
    importlib.import_module("wavemim.targets")
    if module is not None:
        load_module(module)
    if name not in _classes:
        raise ValueError(f"target.kind={name}: not registered; known are {', '.join(known_targets())}")
    return _classes[name]


def predicts_bands(name: str, module: str | None = None) -> bool:
    """Whether the taps of a target predict bands of stored wavelet levels (`Target.predicts_bands`).

    Raises:
        ValueError: If `module` is given and cannot be imported.
    """
    if name in BUILT_IN:
        return name == "wavelet"
    if module is not None:
        load_module(module)
    return name in _classes and _classes[name].predicts_bands


def is_file(module: str) -> bool:
    """Whether `module` names a Python file, not a module by its dotted name."""
    return module.endswith(".py") or "/" in module


def load_module(module: str) -> None:
    """Import a module that registers targets, once per process.

    Args:
        module: The path of a Python file, or the dotted name of a module that can be imported.

    Raises:
        ValueError: If there is no such file or module, or importing it fails.
    """
    try:
        if is_file(module):
            _load_file(Path(module).expanduser().resolve())
        else:
            importlib.import_module(module)
    except Exception as error:  # whatever the module raises
        text = " ".join(str(error).split())
        raise ValueError(f"target.module={module}: cannot be imported: {type(error).__name__}: {text}") from error


def _load_file(path: Path) -> None:
    if any(file == str(path) for file, _ in _origins.values()):
        return  # the running script, or a module imported by its name
    name = f"wavemim_target_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return
    if not path.is_file():
        raise FileNotFoundError("no such file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file; its name has to end in .py")
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # dataclasses and pickle look their module up here
    try:
        spec.loader.exec_module(made)
    except BaseException:  # so that it can be mended and imported again
        del sys.modules[name]
        for target in [target for target, (file, _) in _origins.items() if file == str(path)]:
            del _origins[target], _classes[target]
        raise


def _origin(cls: type) -> tuple[str, str]:
    """Where a class comes from: its file, or its module where that has none (a notebook), and its name."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return (str(Path(file).resolve()) if file else cls.__module__), cls.__qualname__


def arguments_of(cls: type) -> set[str]:
    """The names of the keyword arguments that a target's constructor takes, without `taps` and `statistics`.

    Where a constructor passes further arguments on by ``**kwargs``, those of its base class count too.
    """
    names: set[str] = set()
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters.values()
        names |= {each.name for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return names - {"self", "taps", "statistics"}
