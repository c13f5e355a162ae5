"""The entry point of the `wavemim` command.

`pipeline` is a common name: a module or folder of this name in PYTHONPATH or in the working folder would be imported in its
place. So it is imported from the folder that this package lies in.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def main() -> None:
    """Run the command line, if `pipeline` is installed."""
    _import_beside("pipeline")
    interrupts = importlib.import_module("pipeline.runtime.interrupts")
    interrupts.install()  # before everything that takes time
    try:
        importlib.import_module("pipeline.cli").main()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            interrupts.leaving(ended.code)
        raise
    interrupts.leaving(0)


def _leave_out_working_folder() -> None:
    """`python -m` searches the working folder first, where a numpy.py may lie; the installed command does not."""
    if sys.path and not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]


def _import_beside(name: str) -> None:
    """Import the package `name` that lies beside this one, whatever comes first in sys.path."""
    if name in sys.modules:
        return
    spec = PathFinder.find_spec(name, [str(Path(__file__).resolve().parents[1])])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"wavemim is installed without its package '{name}'; install it again")
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    _leave_out_working_folder()
    main()
