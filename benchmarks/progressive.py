"""Does training that begins with smaller images reach the accuracy of a fixed size in less time?

    python benchmarks/progressive.py --shards SHARDS

Every schedule sees the same images in the same order, with the same recipe, seed and learning-rate schedule, and is
evaluated at the full size, as in evidence.py. Reported for each schedule: its time and FLOPs as shares of those of the
fixed size, the gain in accuracy, and `time_to_equal_accuracy`: the training time until its mean accuracy first reached
the final accuracy of the fixed size, as a share of the time that the fixed size needed for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from evidence import check, journal_of, keep, parser_of, run, settle
from evidence_report import draw, table
from evidence_statistics import Results, training_to_reach
from evidence_variants import TESTBEDS, Variant, settled

FIXED = "64 px"
SCHEDULES: dict[str, Mapping[int, float]] = {
    FIXED: {},
    "32 px for a half": {32: 0.5, 64: 0.5},
    "32 px for three quarters": {32: 0.75, 64: 0.25},
    "16, 32, 64 px, a third each": {16: 0.3333, 32: 0.3333, 64: 0.3334},
}


def compare(results: Results) -> dict[str, dict[str, float | None]]:
    """Each schedule compared with the fixed size: time, FLOPs, final accuracy, and time to equal accuracy."""
    goal = _end(results, FIXED, "top1")
    fixed_time = training_to_reach(results[FIXED], goal, "seconds")
    found: dict[str, dict[str, float | None]] = {}
    for name in results:
        reached = training_to_reach(results[name], goal, "seconds")
        found[name] = {
            "time_share": _end(results, name, "seconds") / _end(results, FIXED, "seconds"),
            "flop_share": _end(results, name, "flops") / _end(results, FIXED, "flops"),
            "gain_in_points": _end(results, name, "top1") - goal,
            "time_to_equal_accuracy": reached / fixed_time if reached is not None and fixed_time else None,
        }
    return found


def _end(results: Results, name: str, key: str) -> float:
    return statistics.mean(curve[-1][key] for curve in results[name] if curve is not None)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--recipe", default="wavelet", help="name without the prefix of the testbed, or a YAML file")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), metavar="NAME")
    arguments = parser.parse_args()
    shards = settle(parser, arguments, "progressive")
    comparison = {
        name: Variant(arguments.recipe, {"train.progressive": dict(sizes)} if sizes else {})
        for name, sizes in SCHEDULES.items()
        if name in {FIXED, *arguments.schedules}
    }
    variants = settled(comparison, TESTBEDS[shards.image_size])
    check(parser, arguments, shards, variants)
    journal = journal_of(arguments, len(variants))
    for found in run(arguments, variants, journal):
        print(f"\n{table(found.results, dict.fromkeys(variants, FIXED))}\n", flush=True)
    results = {name: runs for name, runs in found.results.items() if any(runs)}
    if FIXED in results:
        compared = compare(results)
        _print(compared)
        goals = {f"time_to_equal_accuracy, {name}": line["time_to_equal_accuracy"] for name, line in compared.items()}
        draw(arguments.plot, results)
        keep(arguments, {"schedules": found.results}, goals=goals, finetuned={"schedules": found.tuned})
    if not journal.close():
        raise SystemExit(1)


def _print(compared: Mapping[str, Mapping[str, float | None]]) -> None:
    print("| schedule | time | FLOPs | gain, points | time to equal accuracy |")
    print("|---|---|---|---|---|")
    for name, line in compared.items():
        equal = line["time_to_equal_accuracy"]
        shown = f"{equal:.2f}" if equal is not None else "not reached"
        print(
            f"| {name} | {line['time_share']:.2f} | {line['flop_share']:.2f} | {line['gain_in_points']:+.1f} | {shown} |"
        )


if __name__ == "__main__":
    main()
