"""What the experiments share: run the commands of a published table, and print what was measured beside what is published.

Every script in this folder describes one `Experiment` and calls `main`. Its exit code is 0 where every checked number is
within its tolerance, 1 where one is not or could not be measured, and 2 for a mistake in the call.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_OUT = Path("wavemim-out") / "experiments"
INPUTS = {
    "images": "folder of images",
    "shards": "labelled shard set of 64-px images, made by `wavemim prepare --recipe small images=FOLDER out=OUT`",
    "libraries": "folder that the public loaders were installed into, by `pip install --target`",
}
# Settings of published runs of benchmarks/evidence.py and progressive.py, which its defaults no longer are.
FLOAT32 = ("--set", "train.precision=float32")
RECIPES_BATCH = (*FLOAT32, "train.batch=128", "train.lr=3e-3")
MISSING = object()


@dataclass(frozen=True)
class Call:
    """The arguments of one call; all paths are absolute."""

    out: Path
    quick: bool = False
    images: str = ""
    shards: str = ""
    libraries: str = ""

    def either(self, full: Sequence[object], quick: Sequence[object]) -> list[str]:
        """The arguments of a command: `full` of the published run, `quick` of the reduced one."""
        return [str(argument) for argument in (quick if self.quick else full)]


@dataclass(frozen=True)
class Expected:
    """One published number, and where the results hold it.

    Attributes:
        name: What the number is.
        value: The number in the table's unit; None for a goal that was not reached, True for a statement that held.
        where: The keys that lead to it in the results.
        tolerance: Largest absolute difference in the table's unit; None for speeds, which depend on the machine: they
            are shown and not checked.
        published: The text that stands in the table; by default the number as Python prints it.
        scale: The measured number times this is in the table's unit.
        at_most: `value` is an upper bound instead.
        exact: The number does not depend on the budget, so that `--quick` checks it too.
        known: Why the published number is known to be wrong; a difference is then shown and does not count.
    """

    name: str
    value: float | bool | None
    where: tuple[str | int, ...]
    tolerance: float | None = None
    published: str = ""
    scale: float = 1.0
    at_most: bool = False
    exact: bool = False
    known: str = ""

    @property
    def text(self) -> str:
        """The number as it is published."""
        return self.published or str(self.value)

    def find(self, results: Any) -> Any:
        """The measured number in the table's unit; MISSING where the results do not hold it."""
        for key in self.where:
            try:
                results = results[key]
            except (KeyError, IndexError, TypeError):
                return MISSING
        return results * self.scale if isinstance(results, float | int) and self.scale != 1 else results

    def verdict(self, measured: Any, quick: bool) -> str:
        """How the measured number compares: "agrees", "differs", "missing", or why that does not count."""
        if quick and not self.exact:
            return "not checked: reduced run"
        if measured is MISSING:
            return "missing"
        if self.value is None or isinstance(self.value, bool):
            return "agrees" if measured is self.value else "differs"
        if measured is None or isinstance(measured, bool):
            return "differs"
        if self.at_most:
            return "agrees" if measured <= self.value else "differs"
        if self.tolerance is None:
            return "not checked: depends on the machine"
        if abs(measured - self.value) <= self.tolerance + 1e-9:
            return "agrees"
        return f"differs, as known: {self.known}" if self.known else "differs"

    @property
    def allowed(self) -> str:
        """The tolerance in words."""
        if self.at_most:
            return "at most"
        return "" if self.tolerance is None else f"± {self.tolerance:g}"


def read_json(out: Path, name: str = "result.json") -> Any:
    """The results that a benchmark wrote into the out folder."""
    return json.loads((out / name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Experiment:
    """A published table and how it is made again.

    Attributes:
        tables: Of benchmarks/RESULTS.md: (heading above the table, first cell of its header row).
        commands: The commands that make the results, in order.
        expected: The published numbers.
        inputs: Which of `INPUTS` the call needs.
        read: Reads the results from the out folder.
        measure: Instead of commands: measures in this process and returns the results.
    """

    tables: tuple[tuple[str, str], ...]
    expected: tuple[Expected, ...]
    commands: Callable[[Call], list[list[str]]] = lambda call: []
    inputs: tuple[str, ...] = ()
    read: Callable[[Path], Any] = read_json
    measure: Callable[[Call], Any] | None = None


def benchmark(name: str, *arguments: object) -> list[str]:
    """The command of a script in benchmarks/, with this interpreter."""
    return [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, arguments)]


def wavemim(*arguments: object) -> list[str]:
    """A `wavemim` command, with this interpreter."""
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


def curves(comparison: str, variant: str, *points: float, seed: int = 0, label: str = "") -> tuple[Expected, ...]:
    """The published accuracies of a curve of benchmarks/evidence.py.

    Args:
        comparison: Name of the comparison.
        variant: Name of the variant.
        points: Top-1 in % at each point of training, after that of the untrained encoder.
        seed: Which of the curves.
        label: Name for the table; by default that of the variant.

    Returns:
        One `Expected` a point. The tolerance is the half-width of a 95 % interval, 1.6 points.
    """
    return tuple(
        Expected(
            f"{label or variant}, seed {seed}, point {number} of {len(points)}: top-1, %",
            value,
            ("results", comparison, variant, seed, number, "top1"),
            tolerance=1.6,
        )
        for number, value in enumerate(points, 1)
    )


def table(expected: Sequence[Expected], results: Any, quick: bool) -> tuple[str, bool]:
    """Measured beside published numbers.

    Args:
        expected: The published numbers.
        results: What the commands measured.
        quick: The run was a reduced one.

    Returns:
        The table, and whether no checked number differs or is missing.
    """
    rows = [("", "published", "measured", "tolerance", "")]
    verdicts = []
    for one in expected:
        measured = one.find(results)
        verdicts.append(one.verdict(measured, quick))
        number = isinstance(measured, float | int) and not isinstance(measured, bool)
        shown = "–" if measured is MISSING else f"{measured:.4g}" if number else str(measured)
        rows.append((one.name, one.text, shown, one.allowed, verdicts[-1]))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines), not {"differs", "missing"} & set(verdicts)


def _parser(experiment: Experiment, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in experiment.inputs:
        parser.add_argument(f"--{name}", required=True, metavar="FOLDER", help=INPUTS[name])
    parser.add_argument("--out", type=Path, help=f"folder for the results; default: {DEFAULT_OUT}/NAME")
    parser.add_argument("--quick", action="store_true", help="a reduced run that shows that everything works")
    parser.add_argument("--print", action="store_true", dest="show", help="print the commands and run nothing")
    parser.add_argument("--compare-only", action="store_true", help="compare the results that --out holds")
    return parser


def main(experiment: Experiment, description: str | None, arguments: Sequence[str] | None = None) -> int:
    """The command line of an experiment.

    Args:
        experiment: The experiment.
        description: The script's docstring, for `--help`.
        arguments: The command line; by default that of the process.

    Returns:
        The exit code.
    """
    parser = _parser(experiment, description)
    given = parser.parse_args(arguments)
    places = {}
    for name in experiment.inputs:
        place = getattr(given, name)
        if "://" not in place and not Path(place).is_dir():
            parser.error(f"--{name} {place}: no such folder; give the {INPUTS[name]}")
        places[name] = place if "://" in place else str(Path(place).resolve())
    out = (given.out or DEFAULT_OUT / Path(sys.argv[0]).stem).resolve()
    call = Call(out, given.quick, **places)
    commands = experiment.commands(call)
    if given.show:
        print("\n".join(shlex.join(command) for command in commands) or "no command: measured in this process")
        return 0
    if not given.compare_only:
        out.mkdir(parents=True, exist_ok=True)
        for command in commands:
            print(f"$ {shlex.join(command)}", flush=True)
            if code := subprocess.run(command, check=False).returncode:
                print(f"the command ended with {code}", file=sys.stderr)
                return 1
        if experiment.measure:
            (out / "result.json").write_text(json.dumps(experiment.measure(call), indent=1) + "\n", encoding="utf-8")
    try:
        results = experiment.read(out)
    except FileNotFoundError as error:
        print(f"{error.filename}: no results; run without --compare-only first", file=sys.stderr)
        return 2
    text, agrees = table(experiment.expected, results, call.quick)
    print(f"\n{text}")
    return 0 if agrees else 1
