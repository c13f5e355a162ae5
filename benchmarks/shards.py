"""Preparing, storing and reading shard sets, compared with the usual ways: a table and a JSON file.

    python benchmarks/shards.py --images FOLDER --json FILE [--only NAME …] [--repeats 3] [--libraries FOLDER]

FOLDER holds full-size JPEG photos; a few hundred are enough. Rates are medians over repeats, contenders take turns, and
"one core" means that a process is pinned to it with all of its threads and workers. Public loaders are measured if they
can be imported. To keep their dependencies apart: `pip install --target LIBRARIES webdataset mosaicml-streaming
litdata`, then `--libraries LIBRARIES`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import shards_preparing as preparing
import shards_public as public
from measure import (
    BenchmarkError,
    Child,
    Missing,
    Rates,
    in_child,
    interleaved,
    machine_facts,
    usable_cores,
    write_json,
)

# Every number that can be measured, and its goal: a lower or upper bound, or none.
GOALS: dict[str, tuple[str, float] | None] = {
    "prepare_vs_decode": (">=", 0.9),
    "prepare_vs_pil": (">=", 1.3),
    "read_vs_pil_rrc": (">=", 20),
    "read_vs_best_public": (">=", 1),
    "read_vs_best_public_jpeg": (">=", 2),
    "read_vs_best_public_raw": None,
    "read_threads": (">=", 1.8),
    "bytes_vs_jpeg": ("<=", 0.9),
    "psnr_db": (">=", 45),
    "coarse_vs_full_read": (">=", 2),
    "pixels_vs_pil_rrc": (">=", 6),
    "variants": None,
    "plan_memory_gb": ("<=", 1.5),
    "plan_time_exponent": None,
}
SIZE, PLAN = ("bytes_vs_jpeg", "psnr_db"), ("plan_memory_gb", "plan_time_exponent")
PREPARE = {"prepare_vs_decode": "decode", "prepare_vs_pil": "pil_decode"}
PUBLIC = {
    f"{library} {stored}": (library, stored)
    for library in (*public.PACKAGES, public.REFERENCE)
    for stored in public.FORMATS
    if (library, stored) != (public.REFERENCE, "jpeg")
}
# Only libraries can be the best public loader; the reference is three lines of numpy.
LOADERS = {name: stored for name, (library, stored) in PUBLIC.items() if library != public.REFERENCE}
# Ratio of rates: one contender divided by the fastest of the others.
READING: dict[str, tuple[str, tuple[str, ...]]] = {
    "read_vs_pil_rrc": ("reader", ("pil_rrc",)),
    "pixels_vs_pil_rrc": ("reader_pixels", ("pil_rrc",)),
    "coarse_vs_full_read": ("reader_finest2", ("reader",)),
    "read_vs_best_public": ("reader_fast", tuple(LOADERS)),
    "read_vs_best_public_jpeg": ("reader", tuple(name for name, stored in LOADERS.items() if stored == "jpeg")),
    "read_vs_best_public_raw": ("reader_fast", tuple(name for name, stored in LOADERS.items() if stored == "raw")),
    "read_threads": ("reader_2_threads", ("reader",)),
}
VARIANTS = {"steps 4,2,1": "[4,2,1]", "steps 5,5,4": "[5,5,4]", "steps 6": "[6]"}
LEVELS = tuple(f"level{level}" for level in range(1, 6))
# Codecs of the levels; data.compression=small and fast are two other choices.
CODECS = {
    **{f"{codec} at all levels": dict.fromkeys(LEVELS, codec) for codec in ("zstd", "lz4")},
    "lz4 at the finest level only": {**dict.fromkeys(LEVELS, "none"), "level1": "lz4"},
}
PLAN_COUNTS = {"list": (10_000, 100_000, 1_000_000), "folder": (10_000, 100_000)}


@dataclass
class Bench:
    """The settings, data and results of one call."""

    paths: list[str]
    work: Path
    names: tuple[str, ...]
    repeats: int = 3
    seconds: float = 5.0
    rows: int = 8192
    copies: int = 8
    side: int = 256
    window: int = 224
    batch: int = 64
    libraries: str | None = None
    plan_counts: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(PLAN_COUNTS))
    numbers: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, list[float]] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @cached_property
    def photos(self) -> dict[str, Any]:
        """The decoded photos: {"file", "photos", "bytes"}."""
        out = str(self.work / "photos.npy")
        workers, side = len(usable_cores()), self.side
        found = in_child("shards_reading:decode_photos", paths=self.paths, out=out, workers=workers, side=side)
        return {"file": out, **found}

    @cached_property
    def shards(self) -> dict[str, Any]:
        """The shard set with default settings: {"folder", "bytes_per_image", "written_per_second"}."""
        return self.write_shards("default")

    @cached_property
    def fast_shards(self) -> dict[str, Any]:
        """The shard set with `data.compression=fast`, as `shards`."""
        return self.write_shards("fast", ["data.compression=fast"])

    def write_shards(self, name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Write another shard set of the same photos."""
        out = str(self.work / f"shards-{name}")
        photos = self.photos["file"]
        arguments = {"photos": photos, "out": out, "rows": self.rows, "overrides": overrides}
        return {"folder": out, **in_child("shards_reading:write_shards", Child(cores=1), **arguments)}

    def asked(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that the call asks for."""
        return [name for name in names if name in self.names]

    def keep(self, rates: Rates) -> Rates:
        """Record the rates."""
        self.raw |= rates.repeats
        self.skipped |= rates.skipped
        self.medians |= {name: median for name in rates.repeats if (median := rates.median(name)) is not None}
        return rates


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


def measure_size(bench: Bench) -> None:
    """Bytes of the shard set compared with those of the photos, and the PSNR after quantisation."""
    jpeg = bench.photos["bytes"] / bench.photos["photos"]
    stored = bench.shards["bytes_per_image"]
    fidelity = in_child("shards_reading:fidelity", shards=bench.shards["folder"], photos=bench.photos["file"])
    written = bench.shards["written_per_second"]
    bench.numbers |= {"bytes_vs_jpeg": stored / jpeg, **fidelity, "jpeg_bytes_per_image": jpeg}
    bench.numbers |= {"shard_bytes_per_image": stored, "shard_writer_images_per_second_one_core": written}


def _reader(bench: Bench, cores: int = 1, **options: Any) -> float:
    settings = {"window": bench.window, "batch": bench.batch, "seconds": bench.seconds, **options}
    settings.setdefault("shards", bench.shards["folder"])
    return float(in_child("shards_reading:read_rate", Child(cores=cores), **settings))


def _loader(bench: Bench, name: str) -> float:
    library, stored = PUBLIC[name]
    own = Child(libraries=bench.libraries)
    folder = bench.work / f"public-{library}-{stored}"
    if not folder.exists():
        arguments = {"photos": bench.photos["file"], "out": str(folder), "rows": bench.rows}
        made = in_child("shards_public:write", own, library=library, stored=stored, **arguments)
        bench.versions[name] = made["version"]
        bench.numbers[f"bytes_per_image {name}"] = made["bytes_per_image"]
    sizes = {"side": bench.side, "window": bench.window, "batch": bench.batch, "seconds": bench.seconds}
    call: dict[str, Any] = {"library": library, "stored": stored, "folder": str(folder), **sizes}
    return float(in_child("shards_public:read_rate", replace(own, cores=1), **call))


def _reading_contenders(bench: Bench) -> dict[str, Callable[[], float]]:
    every: dict[str, Callable[[], float]] = {
        "reader": partial(_reader, bench),
        "reader_fast": lambda: _reader(bench, shards=bench.fast_shards["folder"]),
        "reader_finest2": partial(_reader, bench, finest=2),
        "reader_pixels": partial(_reader, bench, pixels=True),
        "reader_2_threads": partial(_reader, bench, threads=2, cores=2),
        "pil_rrc": partial(
            in_child,
            "shards_reading:pil_rate",
            Child(cores=1),
            paths=bench.paths,
            seconds=bench.seconds,
            window=bench.window,
            batch=bench.batch,
        ),
        **{name: partial(_loader, bench, name) for name in PUBLIC},
    }
    needed = {name for number in bench.asked(tuple(READING)) for name in (READING[number][0], *READING[number][1])}
    if needed & set(LOADERS):
        needed |= set(PUBLIC) - set(LOADERS)
    return {name: contender for name, contender in every.items() if name in needed}


def measure_reading(bench: Bench) -> None:
    """The training reader compared with its alternatives, on one core."""
    contenders = _reading_contenders(bench)
    _ = bench.shards, "reader_fast" in contenders and bench.fast_shards  # written before anything is timed
    rates = bench.keep(interleaved(contenders, bench.repeats, say))
    for number in bench.asked(tuple(READING)):
        mine, others = READING[number]
        bench.numbers[number] = rates.ratio(mine, others)
        if number.startswith("read_vs_best_public"):
            medians = [(median, name) for name in others if (median := rates.median(name)) is not None]
            bench.numbers[f"{number}_name"] = max(medians)[1] if medians else None
            bench.skipped |= public.UNMEASURED


def measure_variants(bench: Bench) -> None:
    """Other quantisation steps and codecs: bytes, PSNR and reading speed."""
    sets = {"default": bench.shards, "fast": bench.fast_shards}
    for name, steps in VARIANTS.items():
        sets[name] = bench.write_shards(name.replace(" ", "-"), [f"data.steps={steps}"])
    for name, codecs in CODECS.items():
        out = str(bench.work / f"shards-{name.replace(' ', '-')}")
        call: dict[str, Any] = {"shards": bench.shards["folder"], "out": out, "codecs": codecs}
        sets[name] = {"folder": out, **in_child("shards_reading:recode_shards", **call)}
    contenders: dict[str, Callable[[], float]] = {}
    for name, made in sets.items():
        contenders[f"variant {name}"] = partial(_reader, bench, shards=made["folder"])
        contenders[f"variant {name}, finest=2"] = partial(_reader, bench, shards=made["folder"], finest=2)
    rates = bench.keep(interleaved(contenders, bench.repeats, say))
    bench.numbers["variants"] = {
        name: {
            "bytes_per_image": made["bytes_per_image"],
            **in_child("shards_reading:fidelity", shards=made["folder"], photos=bench.photos["file"]),
            "images_per_second": rates.median(f"variant {name}"),
            "images_per_second_finest2": rates.median(f"variant {name}, finest=2"),
        }
        for name, made in sets.items()
    }


def measure_prepare(bench: Bench) -> None:
    """The whole prepare stage compared with decoding only, on all cores and several copies of every photo."""
    paths = preparing.link_copies(bench.paths, bench.work / "copies", bench.copies)
    for path in paths:
        Path(path).read_bytes()  # into the page cache
    workers = len(usable_cores())
    with preparing.PrepareRuns(bench.work / "copies", bench.work) as runs:
        contenders = {"prepare": runs.run}
        for name, decoder in (("decode", "prepare"), ("pil_decode", "plain")):
            call: dict[str, Any] = {"decoder": decoder, "paths": paths, "workers": workers, "side": bench.side}
            contenders[name] = partial(in_child, "shards_reading:decode_rate", **call)
        rates = bench.keep(interleaved(contenders, bench.repeats, say))
        own = [len(paths) / seconds for seconds in runs.seconds]
        if own:
            stage = Rates({**rates.repeats, "prepare_stage": own}, {})
            bench.raw["prepare_stage"], bench.medians["prepare_stage"] = own, stage.median("prepare_stage") or 0.0
            bench.numbers |= {"prepare_seconds": runs.seconds, "prepare_call_seconds": runs.wall}
            for number, other in PREPARE.items():
                bench.numbers[number] = stage.ratio("prepare_stage", (other,))
                bench.numbers[f"{number}_whole_call"] = stage.ratio("prepare", (other,))
            bench.numbers["prepare_ms"] = _prepare_parts(bench, workers)


def _prepare_parts(bench: Bench, workers: int) -> dict[str, float]:
    """What the stage does for an image, in ms on one core; what its tasks do not account for is Ray and waiting."""
    folders = {"images": str(bench.work / "copies"), "work": str(bench.work)}
    ms = in_child("shards_preparing:task_parts", Child(cores=1), **folders)
    whole = workers * 1000 / bench.medians["prepare_stage"]
    ms = {**ms, "Ray, other processes, cores that wait": whole - ms["task"], "prepare stage": whole}
    return {**ms, "its decoder alone": workers * 1000 / bench.medians["decode"]}


def measure_plan(bench: Bench) -> None:
    """Memory and time of planning many inputs; nothing is decoded."""
    found: dict[str, list[dict[str, float]]] = {}
    for kind, counts in bench.plan_counts.items():
        for count in counts:
            made = in_child("shards_preparing:plan", count=count, kind=kind, work=str(bench.work))
            found.setdefault(kind, []).append(made)
            say(f"plan of {count} inputs ({kind}): {made['seconds']:.2f} s, peak {made['peak_gb']:.2f} GB")
    bench.numbers["plans"] = found
    bench.numbers["plan_memory_gb"] = found["list"][-1]["peak_gb"]
    points = [(made["inputs"], made["seconds"]) for made in found["list"]]
    bench.numbers["plan_time_exponent"] = preparing.exponent(points)


def _parts(names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Callable[[Bench], None]]]:
    every: list[tuple[tuple[str, ...], Callable[[Bench], None]]] = [
        (tuple(PREPARE), measure_prepare),
        (SIZE, measure_size),
        (tuple(READING), measure_reading),
        (("variants",), measure_variants),
        (PLAN, measure_plan),
    ]
    return ((numbers, part) for numbers, part in every if set(numbers) & set(names))


def run(bench: Bench, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure what the call asks for and save after every part; what cannot be measured is skipped with its reason."""
    facts = machine_facts()
    for numbers, part in _parts(bench.names):
        try:
            part(bench)
        except (Missing, BenchmarkError) as error:
            for number in bench.asked(numbers):
                bench.skipped[number] = f"needs {error}" if isinstance(error, Missing) else str(error)
            say(f"{', '.join(bench.asked(numbers))}: skipped, {error}")
        save(_result(bench, facts))
    return _result(bench, facts)


def _result(bench: Bench, facts: dict[str, Any]) -> dict[str, Any]:
    settings = ("repeats", "seconds", "rows", "copies", "side", "window", "batch")
    return {
        "machine": facts,
        "settings": {"photos": len(bench.paths), **{name: getattr(bench, name) for name in settings}},
        "only": list(bench.names),
        "numbers": bench.numbers,
        "goals": {name: verdict(name, bench.numbers.get(name)) for name in bench.names if GOALS[name]},
        "images_per_second": bench.medians,
        "repeats": bench.raw,
        "alternatives": [
            {"name": name, "version": version, "images_per_second": bench.medians.get(name)}
            for name, version in {**bench.versions, **_own_alternatives(bench, facts)}.items()
        ],
        "left_out": bench.skipped,
    }


def _own_alternatives(bench: Bench, facts: dict[str, Any]) -> dict[str, str]:
    pillow = f"pillow {facts['pillow']}"
    known = {"pil_decode": pillow, "pil_rrc": f"{pillow}, torchvision {facts['torchvision']}, torch {facts['torch']}"}
    return {name: version for name, version in known.items() if name in bench.medians}


def verdict(name: str, value: float | None) -> str:
    """A goal, and whether it is reached."""
    goal = GOALS[name]
    assert goal is not None, name
    bound = f"{goal[0]} {goal[1]:g}"
    if value is None:
        return f"{bound}: not measured"
    return f"{bound}: {'reached' if (value >= goal[1] if goal[0] == '>=' else value <= goal[1]) else 'missed'}"


def table(result: dict[str, Any]) -> str:
    """The results as text."""
    lines = [f"{name:44} {value:12.1f} images/s" for name, value in result["images_per_second"].items()]
    for name, value in result["numbers"].items():
        goal = result["goals"].get(name, "")
        if isinstance(value, int | float):
            lines.append(f"{name:44} {value:12.3f} {goal}".rstrip())
        elif isinstance(value, str):
            lines.append(f"{name:44} {value}")
    lines += [f"prepare: {name:35} {ms:12.3f} ms/image" for name, ms in result["numbers"].get("prepare_ms", {}).items()]
    for name, made in result["numbers"].get("variants", {}).items():
        speed = f"{made['images_per_second'] or 0:.0f}, finest=2 {made['images_per_second_finest2'] or 0:.0f} images/s"
        lines.append(f"variant {name:36} {made['bytes_per_image']:12.0f} B, {made['psnr_db']:.2f} dB, {speed}")
    lines += [f"{name:44} skipped: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def find_photos(folder: Path) -> list[str]:
    """All JPEG files below a folder, sorted by name."""
    suffixes = {".jpg", ".jpeg"}
    return sorted(str(path.absolute()) for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG photos")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--only", nargs="+", choices=GOALS, default=list(GOALS), metavar="NAME", help=", ".join(GOALS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="minimum duration of a repeat of reading")
    parser.add_argument("--rows", type=int, default=8192, help="rows per epoch; the photos repeat")
    parser.add_argument("--copies", type=int, default=8, help="copies of every photo for the prepare stage")
    parser.add_argument("--libraries", help="folder with the public loaders, imported only where they are measured")
    parser.add_argument(
        "--work", type=Path, help="folder for some GB of temporary data; default: the system's temporary folder"
    )
    given = parser.parse_args(arguments)
    paths = find_photos(given.images)
    if not paths:
        print(f"error: no JPEG images below {given.images}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=given.work, prefix="shards-") as work:
        options = {name: getattr(given, name) for name in ("repeats", "seconds", "rows", "copies", "libraries")}
        result = run(Bench(paths, Path(work), tuple(given.only), **options), partial(write_json, given.json))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
