"""Which target, decoder, mask or weighting yields the best encoder? Same shard set, seeds, data order, masks and budget.

    python benchmarks/evidence.py --shards SHARDS                             # screening: 100,000 images, one seed
    python benchmarks/evidence.py --shards SHARDS --finals --compare claims   # 800,000 images, three seeds
    python benchmarks/evidence.py --shards SHARDS --full --device cuda        # the claims with a ViT-S on one GPU

Every variant of a comparison is trained without Ray from the same seeds on the same rows with the same masks (they are a
function of seed, epoch and row). The frozen encoder is evaluated by a linear probe on all of val at several points during
training; with --finetune also by fine-tuning at the end. Variants are compared image by image on val, at equal images, equal
FLOPs and equal process time, each difference with its 95 % interval (evidence_statistics.py).

SHARDS is a labelled shard set of 64-px images (recipes small_*) or 32-px images (small32_*). A small one for --full, 48 MiB for
12,500 train and 5,000 val images, is made of 50 classes of Tiny ImageNet (train/CLASS/CLASS_N.JPEG, val/CLASS/…) by

    (cd tiny-imagenet-50; find train val -name '*.JPEG' | awk -F'[/_.]' 'BEGIN {print "path,label,split"}
      $1 == "val" {print $0 "," $2 ",val"}
      $1 == "train" && $4 < 300 {print $0 "," $2 "," ($4 < 250 ? "train" : "val")}' > carried.csv)
    wavemim prepare --recipe small images=tiny-imagenet-50/carried.csv out=carried 'data.steps=[40, 32, 16, 16]'

Variants take turns, seed by seed. Seconds are those of training only: on a CPU the CPU seconds of the process; on a GPU, where
several variants are trained at the same time, they follow from the speed of each variant alone. The same command resumes an
interrupted call, also in the middle of a run; nohup and a low priority are fine. Results go to
results/evidence-DATE-DEVICE.json in this folder, with tables (.md) and a plot (.png) beside them.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from evidence_journal import Journal
from evidence_report import claim_lines, claims_of, differences, draw, table, tuned_table
from evidence_statistics import Curve, Results
from evidence_training import at_pace
from evidence_variants import COMPARISONS, DECISIVE, SIZES, TESTBEDS, Comparison, Variant, grown, settled
from measure import machine_facts, usable_cores, write_json

FULL_MINUTES = 8.0
PACE_STEPS, PACE_SECONDS = 100, 25.0  # of measuring a variant's speed alone, and how long that is expected to take


@dataclass(frozen=True)
class Found:
    """What is known so far: the runs of each variant by seed, and what fine-tuning them gave."""

    results: Results
    tuned: Mapping[str, list[Any]]


def run(arguments: argparse.Namespace, variants: Comparison, journal: Journal) -> Iterator[Found]:
    """Train every variant with every seed, `jobs` of them at a time; yields what there is after every seed and at the end.

    All curves begin with the untrained encoder of the first variant, which is probed once per seed.
    """
    results: dict[str, list[Curve | None]] = {name: [] for name in variants}
    tuned: dict[str, list[Any]] = {name: [] for name in variants} if arguments.finetune else {}
    pool = ThreadPoolExecutor(arguments.jobs)
    try:
        pending: dict[tuple[str, int], Future[Any]] = {}
        for seed in range(arguments.seeds):
            pending["", seed] = pool.submit(_untrained, arguments, next(iter(variants.values())), seed, journal)
            for name, variant in variants.items():
                pending[name, seed] = pool.submit(_one, arguments, name, variant, seed, journal)
        for seed in range(arguments.seeds):
            start = pending["", seed].result()
            for name in variants:
                points, judged = pending[name, seed].result()
                results[name].append(None if points is None or start is None else [start, *points])
                if arguments.finetune:
                    tuned[name].append(judged)
            if seed < arguments.seeds - 1 or arguments.device == "cpu":
                yield Found(results, tuned)
    finally:
        pool.shutdown(cancel_futures=True)
    if arguments.device != "cpu":
        yield Found(_at_own_pace(arguments, variants, journal, results), tuned)


def _task(arguments: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """The arguments of a run that do not depend on the seed and the length."""
    overrides = overrides_of(arguments, variant)
    return {
        "shards_at": arguments.shards,
        "recipe_name": variant.recipe,
        "overrides": overrides,
        "device": arguments.device,
    }


def _untrained(arguments: argparse.Namespace, variant: Variant, seed: int, journal: Journal) -> Any | None:
    task = _task(arguments, variant)
    return journal.result("untrained", f"untrained, seed {seed}", arguments.threads, **task, seed=seed)


def _one(arguments: argparse.Namespace, name: str, variant: Variant, seed: int, journal: Journal) -> tuple[Any, Any]:
    """One run, and what fine-tuning its encoder gave; None for what is missing."""
    task = {**_task(arguments, variant), "seed": seed}
    images = round(variant.images * arguments.images_seen)
    training = {**task, "images_seen": images, "points": arguments.points, "warmup": variant.warmup}
    label, work = f"{name}, seed {seed}", journal.folder_of(**training)
    tuning = {key: task[key] for key in ("shards_at", "overrides", "seed", "device")} | {"epochs": arguments.finetune}
    tuned = not arguments.finetune or journal.knows("finetuned", of=work.name, **tuning)
    if not tuned and not work.is_dir():
        journal.forget("curve", **training)  # its encoder is gone
    points = journal.result("curve", label, arguments.threads, amount=images, work=work, **training)
    if points is None or not arguments.finetune:
        judged = None
    else:
        judged = journal.result(
            "finetuned",
            f"{label}, fine-tuning",
            arguments.threads,
            amount=arguments.finetune,
            work=work,
            of=work.name,
            **tuning,
        )
    if points is not None and (judged is not None or not arguments.finetune):
        shutil.rmtree(work, ignore_errors=True)
    return points, judged


def _at_own_pace(
    arguments: argparse.Namespace, variants: Comparison, journal: Journal, results: Mapping[str, list[Curve | None]]
) -> Results:
    """The runs with seconds by each variant's speed alone on the device; without it, as they were taken."""
    found: dict[str, list[Curve | None]] = {}
    for name, variant in variants.items():
        task = _task(arguments, variant)
        rates = journal.result("pace", f"{name}, speed", arguments.threads, steps=PACE_STEPS, **task)
        runs = results[name]
        found[name] = [at_pace(list(curve), rates) if curve and rates else curve for curve in runs]
    return found


def overrides_of(arguments: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """All settings of a variant that are not its recipe's: those of the size, its own, and those of --set."""
    overrides = {**SIZES[arguments.size].settings, **variant.overrides}
    if arguments.size == "full":
        overrides = grown(variant.recipe, overrides)
    return {**overrides, **arguments.set}


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options that evidence.py and progressive.py share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", required=True, help="a labelled shard set of 64-px or 32-px images (wavemim prepare)"
    )
    sizes = parser.add_mutually_exclusive_group()
    for name, size in SIZES.items():
        words = f"{size.images:,} images, {size.seeds} seed{'s' * (size.seeds > 1)}, {size.points} probes"
        more = {"screen": "; the default", "finals": "", "full": f"; a ViT-S, for a GPU, --minutes {FULL_MINUTES:g}"}[
            name
        ]
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=words + more)
    parser.set_defaults(size="screen")
    parser.add_argument("--images-seen", type=int, help="images that every variant is trained on")
    parser.add_argument("--points", type=int, help="probes during training")
    parser.add_argument("--seeds", type=int, help="seeds per variant")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of all variants"
    )
    parser.add_argument(
        "--finetune", type=float, nargs="?", const=10.0, metavar="EPOCHS", help="also fine-tune; default: 10 epochs"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, help="variants trained at the same time; on a CPU one per core, on a GPU 4")
    parser.add_argument("--threads", type=int, help="threads per variant; default: 1 on a CPU, all on a GPU")
    parser.add_argument("--minutes", type=float, help="time limit; what does not fit is skipped, and named at the end")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--plot", type=Path, help="file for the plot")
    return parser


def settle(parser: argparse.ArgumentParser, arguments: argparse.Namespace, name: str) -> Any:
    """Fill in the defaults; returns the shard set.

    Raises:
        SystemExit: The device, the shard set or its image size does not fit.
    """
    import torch

    from pipeline.errors import SettingError, StageError
    from pipeline.shards.shard_set import ShardSet

    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch sees no GPU here")
    if "://" not in arguments.shards:
        arguments.shards = str(Path(arguments.shards).absolute())
    try:
        shards = ShardSet.open(arguments.shards)
    except (SettingError, StageError, OSError, ValueError) as error:
        parser.error(f"--shards {arguments.shards}: {error}")
    if shards.image_size not in TESTBEDS:
        known = " or ".join(map(str, TESTBEDS))
        parser.error(f"--shards {arguments.shards} has images of {shards.image_size} px; they must be of {known} px")
    if wrong := [text for text in arguments.set if "=" not in text]:
        parser.error(f"--set {wrong[0]}: must be KEY=VALUE")
    arguments.set = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in arguments.set)}
    size = SIZES[arguments.size]
    arguments.images_seen = arguments.images_seen or size.images
    arguments.seeds, arguments.points = arguments.seeds or size.seeds, arguments.points or size.points
    arguments.jobs = arguments.jobs or (4 if arguments.device != "cpu" else len(usable_cores()))
    arguments.threads = arguments.threads or (
        max(1, len(usable_cores()) // arguments.jobs) if arguments.device != "cpu" else 1
    )
    if arguments.size == "full":
        arguments.minutes = arguments.minutes or FULL_MINUTES
    device = torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu"
    stem = f"{name}-{datetime.now(UTC):%Y-%m-%d}-{re.sub('[^a-z0-9]+', '-', device.lower())}"
    arguments.json = arguments.json or Path(__file__).with_name("results") / f"{stem}.json"
    arguments.plot = arguments.plot or arguments.json.with_suffix(".png")
    return shards


def check(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, shards: Any, variants: Mapping[str, Variant]
) -> None:
    """Check the settings of all variants before any is trained.

    Raises:
        SystemExit: A setting of a variant is unknown or not allowed.
    """
    from evidence_training import recipe_of

    from pipeline.errors import SettingError

    for name, variant in variants.items():
        try:
            overrides = overrides_of(arguments, variant)
            recipe_of(shards, variant.recipe, overrides, seed=0, images_seen=arguments.images_seen)
        except SettingError as error:
            parser.error(f"{name}: {error}")


def journal_of(arguments: argparse.Namespace, variants: int) -> Journal:
    """The journal of these results; on a GPU, time is kept for measuring the speed of so many variants."""
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    reserve = PACE_SECONDS * variants if arguments.device != "cpu" else 0
    return Journal(arguments.json.with_suffix(".unfinished.jsonl"), arguments.minutes, reserve)


def keep(arguments: argparse.Namespace, results: Mapping[str, Results], **more: Any) -> None:
    """Write the numbers."""
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "plot", "shards")}
    write_json(arguments.json, {"machine": machine_facts(), "settings": settings, **more, "results": results})


def chosen_variants(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, image_size: int
) -> dict[str, dict[str, Variant]]:
    """The variants of each comparison that are to be run."""
    known = {name for comparison in arguments.compare for name in COMPARISONS[comparison]}
    if unknown := set(arguments.variants or ()) - known:
        parser.error(f"--variants {', '.join(sorted(unknown))}: unknown; there are {', '.join(sorted(known))}")
    found = {}
    for comparison in arguments.compare:
        variants = settled(COMPARISONS[comparison], TESTBEDS[image_size])
        chosen = {name: variant for name, variant in variants.items() if name in (arguments.variants or [name])}
        if chosen:
            found[comparison] = chosen
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, help="default: targets, with --full: claims")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants of the comparisons")
    arguments = parser.parse_args()
    arguments.compare = arguments.compare or ["claims" if arguments.size == "full" else "targets"]
    shards = settle(parser, arguments, "evidence")
    chosen = chosen_variants(parser, arguments, shards.image_size)
    for variants in chosen.values():
        check(parser, arguments, shards, variants)
    journal = journal_of(arguments, sum(map(len, chosen.values())))
    report = _Report(arguments)
    for comparison, variants in chosen.items():
        for found in run(arguments, variants, journal):
            report.add(comparison, variants, found)
    print(f"numbers: {arguments.json}, plot: {arguments.plot}")
    if not journal.close():
        raise SystemExit(1)


class _Report:
    """Everything found so far, written and printed again with every addition."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results: dict[str, Results] = {}
        self.texts: dict[str, str] = {}
        self.more: dict[str, dict[str, Any]] = {"goals": {}, "claims": {}, "differences": {}, "finetuned": {}}

    def add(self, comparison: str, variants: Mapping[str, Variant], found: Found) -> None:
        """Take in what is known of a comparison, print it, and write the numbers, the tables and the plot."""
        baselines = {name: variant.baseline or name for name, variant in variants.items()}
        claims, goals = claims_of(found.results) if comparison in DECISIVE else ({}, {})
        self.results[comparison] = found.results
        self.more["goals"] |= goals
        self.more["claims"] |= claims
        self.more["finetuned"][comparison] = found.tuned
        self.more["differences"][comparison] = {
            name: {key: one and one.record() for key, one in by_budget.items()}
            for name, by_budget in differences(found.results, baselines).items()
        }
        parts = [f"## {comparison}", table(found.results, baselines)]
        parts += [tuned_table(found.tuned, baselines)] if found.tuned else []
        parts += [claim_lines(claims)] if claims else []
        parts += ["\n".join(f"{name}: {value}" for name, value in goals.items())] if goals else []
        self.texts[comparison] = "\n\n".join(parts)
        print(f"\n{self.texts[comparison]}\n", flush=True)
        plot = self.arguments.plot
        first = next(iter(self.results)) == comparison
        draw(plot if first else plot.with_stem(f"{plot.stem}-{comparison}"), found.results)
        keep(self.arguments, self.results, **self.more)
        self.arguments.json.with_suffix(".md").write_text("\n\n".join(self.texts.values()) + "\n")


if __name__ == "__main__":
    main()
