"""Tables, plots and claims of evidence.py and progressive.py."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence_statistics import (
    Curve,
    Difference,
    Results,
    Runs,
    compare,
    correct_at,
    difference,
    mean_curve,
    paired,
    training_to_reach,
)
from evidence_training import correct_of

BUDGETS = {"images": "images", "flops": "FLOPs", "seconds": "process time"}  # keys of a point
MARGIN = 0.5  # points: a variant that may be worse by less is as good
SHARE = 0.4  # of MAE's FLOPs and process time, within which the recipe is to reach its accuracy


def verdict(found: Difference | None) -> str:
    """One word or two, and of a variant that does nothing how large an effect would have been seen."""
    if found is None:
        return "not comparable"
    if found.low > 0:
        return "better"
    if found.high < 0:
        return "worse"
    return f"does nothing (more than {max(-found.low, found.high):.1f} points excluded)"


def shown(found: Difference | None) -> str:
    """The difference in points with its interval."""
    return "–" if found is None else f"{found.points:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def differences(results: Results, baselines: Mapping[str, str]) -> dict[str, dict[str, Difference | None]]:
    """Each variant compared with its baseline at equal images, equal FLOPs and equal process time.

    Args:
        results: The runs of each variant.
        baselines: The baseline of each variant; those that are missing or their own baseline are left out.

    Returns:
        {variant: {"images", "flops" or "seconds": difference}}.
    """
    return {
        name: {key: compare(results[name], results[base], key) for key in BUDGETS}
        for name, base in baselines.items()
        if name in results and base in results and name != base
    }


def table(results: Results, baselines: Mapping[str, str]) -> str:
    """Each variant's accuracy at the end, its difference to the baseline at equal budgets, and its cost, in Markdown."""
    head = ["variant", "top-1, % (each seed)", *(f"at equal {words}" for words in BUDGETS.values()), "verdict"]
    head += ["images/s", "TFLOP"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    compared = differences(results, baselines)
    for name, runs in results.items():
        ends = [curve[-1] for curve in runs if curve is not None]
        if not ends:
            lines.append(f"| {name} | not run" + " |" * (len(head) - 1))
            continue
        each = ", ".join(f"{end['top1']:.1f}" for end in ends)
        cells = [name, f"{statistics.mean(end['top1'] for end in ends):.1f} ({each})"]
        if name in compared:
            cells += [*(shown(compared[name][key]) for key in BUDGETS), verdict(compared[name]["images"])]
        else:
            cells += ["", "", "", "baseline" if name in baselines.values() else ""]
        rate = statistics.median(end["images"] / max(end["seconds"], 1e-9) for end in ends)
        lines.append("| " + " | ".join([*cells, f"{rate:.0f}", f"{ends[0]['flops'] / 1e12:.0f}"]) + " |")
    if starts := [curve[0]["top1"] for runs in results.values() for curve in runs if curve and curve[0]["images"] == 0]:
        lines.append(f"| untrained | {statistics.mean(starts):.1f}" + " |" * (len(head) - 1))
    return "\n".join([*lines, "", *_notes(results, compared, baselines)])


def _notes(
    results: Results, compared: Mapping[str, Mapping[str, Difference | None]], baselines: Mapping[str, str]
) -> list[str]:
    """What the table's numbers are."""
    if not any(found for line in compared.values() for found in line.values()):
        return []
    against = ", ".join(f"“{name}”" for name in dict.fromkeys(baselines[name] for name in compared))
    images = next((len(correct_of(c[-1])) for runs in results.values() for c in runs if c is not None), 0)
    lines = [
        f"Differences in points to {against}, paired by val image ({images:,}) and seed, with 95 % intervals; at the largest "
        "budget that both have reached. FLOPs are counted."
    ]
    if any(found and found.seeds > 1 for line in compared.values() for found in line.values()):
        lines.append("The intervals are over images and seeds.")
    else:
        lines.append("With one seed, the intervals are over images alone: another seed may move the numbers further.")
    return lines


def difference_of_points(first: Sequence[Any], second: Sequence[Any]) -> Difference | None:
    """Compare two variants that were fine-tuned.

    Args:
        first: The result of the first variant for each seed; None where it was not run.
        second: Those of the second.

    Returns:
        By how much the first is more accurate; None if they have no seed in common.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=False) if a is not None and b is not None]
    if not pairs:
        return None
    return difference(*(np.stack([correct_of(pair[side]) for pair in pairs]) for side in (0, 1)))


def tuned_table(tuned: Mapping[str, Sequence[Any]], baselines: Mapping[str, str]) -> str:
    """Accuracy after fine-tuning: each variant's, and its difference to the baseline, in Markdown."""
    lines = ["| variant | fine-tuned top-1, % (each seed) | difference | verdict |", "|---|---|---|---|"]
    for name, points in tuned.items():
        known = [point["top1"] for point in points if point is not None]
        if not known:
            lines.append(f"| {name} | not run | | |")
            continue
        each, base = ", ".join(f"{value:.1f}" for value in known), baselines.get(name)
        cells = ["", "baseline"]
        if base in tuned and base != name:
            found = difference_of_points(points, tuned[base])
            cells = [shown(found), verdict(found)]
        lines.append(f"| {name} | {statistics.mean(known):.1f} ({each}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def best_of(results: Results, prefix: str) -> str | None:
    """The variant with the highest accuracy at the end among those whose names begin with `prefix`."""
    ends = {name: mean_curve(runs, "images")[-1][1] for name, runs in results.items() if any(runs)}
    return max((name for name in ends if name.startswith(prefix)), key=ends.__getitem__, default=None)


def training_share(results: Results) -> float | None:
    """Images that the wavelet target needs to reach the best mean accuracy of the best pixel target, as a share of those
    that the latter needed; None if it never does."""
    peaks = {
        name: max(top1 for _, top1 in mean_curve(runs, "images"))
        for name, runs in results.items()
        if name.startswith("pixels") and any(runs)
    }
    if not peaks:
        return None
    name = max(peaks, key=peaks.__getitem__)
    own = training_to_reach(results[name], peaks[name])
    ours = training_to_reach(results["wavelet"], peaks[name])
    return ours / own if own and ours is not None else None


def target_alone(results: Results) -> dict[str, Any] | None:
    """The claim that with everything else equal the wavelet target is as good as the best pixel target, and sooner.

    It holds if at the end the lower end of the interval of the difference is above -`MARGIN` points, and if after half of
    the images the difference is positive. The best pixel target is the one that is best at the end.
    """
    best = best_of(results, "pixels")
    end = compare(results.get("wavelet", ()), results[best]) if best else None
    if best is None or end is None:
        return None
    half = compare(results["wavelet"], results[best], value=end.at / 2)
    assert half is not None
    holds = end.low > -MARGIN and half.points > 0
    return {"holds": holds, "against": best, "end": end.record(), "half": half.record()}


def whole_recipe(results: Results) -> dict[str, Any] | None:
    """The claim that the recipe reaches MAE's final accuracy with at most `SHARE` of its FLOPs and process time.

    The recipe is the variant `recipe`, or `wavelet` where there is none. For FLOPs and for process time: `share` is where the
    mean curve of the recipe first reaches the mean final accuracy of MAE, as a share of what MAE has used; None if it never
    does. The interval is that of the paired difference between the recipe at `SHARE` of MAE's budget (or at its end, if that
    comes before) and MAE at its end. The claim holds if both shares are at most `SHARE` and both lower ends are above
    -`MARGIN` points: the same margin as in `target_alone`.
    """
    pairs = paired(results.get("recipe") or results.get("wavelet", ()), results.get("mae", ()))
    if not pairs:
        return None
    ours, maes = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    goal = statistics.mean(curve[-1]["top1"] for curve in maes)
    found: dict[str, Any] = {"goal": goal}
    for key in ("flops", "seconds"):
        total = statistics.mean(curve[-1][key] for curve in maes)
        needed = training_to_reach(ours, goal, key)
        at = difference(
            np.stack([correct_at(curve, key, SHARE * total) for curve in ours]),
            np.stack([correct_of(curve[-1]) for curve in maes]),
            at=SHARE * total,
        )
        found[key] = {"share": needed / total if needed is not None else None, "difference": at.record()}
    found["holds"] = all(
        found[key]["share"] is not None and found[key]["share"] <= SHARE and found[key]["difference"]["low"] > -MARGIN
        for key in ("flops", "seconds")
    )
    return found


def claims_of(results: Results) -> tuple[dict[str, Any], dict[str, float | None]]:
    """The claims that can be decided from these variants, and the numbers that decide them."""
    claims: dict[str, Any] = {}
    goals: dict[str, float | None] = {}
    if "wavelet" in results and best_of(results, "pixels"):
        goals["wavelet_training_to_reach_best_pixel"] = training_share(results)
        if (alone := target_alone(results)) is not None:
            claims["target_alone"] = alone
            goals |= {f"target_alone_difference_{when}": alone[when]["points"] for when in ("end", "half")}
    if (whole := whole_recipe(results)) is not None:
        claims["recipe"] = whole
        goals["recipe_flops_share"] = whole["flops"]["share"]
        goals["recipe_time_share"] = whole["seconds"]["share"]
    return claims, goals


def claim_lines(claims: Mapping[str, Any]) -> str:
    """The claims in words."""
    lines = []
    for name, claim in claims.items():
        lines.append(f"- `{name}` {'holds' if claim['holds'] else 'does not hold'}:")
        if name == "target_alone":
            for when in ("end", "half"):
                found = claim[when]
                lines.append(
                    f"  wavelet against {claim['against']}, {when} of the training: {found['points']:+.2f} points "
                    f"[{found['low']:+.2f}, {found['high']:+.2f}]"
                )
            continue
        for key in ("flops", "seconds"):
            share, found = claim[key]["share"], claim[key]["difference"]
            reached = f"in {share:.2f} of MAE's" if share is not None else "never"
            lines.append(
                f"  {BUDGETS[key]}: MAE's {claim['goal']:.1f} % are reached {reached}; at {SHARE:g} of MAE's "
                f"the difference is {found['points']:+.2f} points [{found['low']:+.2f}, {found['high']:+.2f}]"
            )
    return "\n".join(lines)


def draw(path: Path, results: Results) -> None:
    """Plot accuracy against images, FLOPs and seconds of training: a line for each variant, its seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 5), layout="constrained", sharey=True)
    words = {"images": "images seen", "flops": "TFLOP of training", "seconds": "seconds of training"}
    styles = list(itertools.product(("-", "--", ":", "-."), plt.get_cmap("tab10").colors))
    for axis, (key, label) in zip(axes, words.items(), strict=True):
        unit = 1e12 if key == "flops" else 1
        for number, (name, runs) in enumerate(results.items()):
            curves = _of_equal_length(runs)
            if not curves:
                continue
            line, color = styles[number % len(styles)]
            x = [x / unit for x, _ in mean_curve(curves, key)]
            at = [[curve[i]["top1"] for curve in curves] for i in range(len(x))]
            mean = [statistics.mean(values) for values in at]
            axis.plot(x, mean, linestyle=line, color=color, marker=".", label=name)
            axis.fill_between(x, [min(v) for v in at], [max(v) for v in at], color=color, alpha=0.15, linewidth=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("linear probe, top-1 in %")
    lines, names = axes[0].get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _of_equal_length(runs: Runs) -> list[Curve]:
    curves = [curve for curve in runs if curve is not None]
    shortest = min((len(curve) for curve in curves), default=0)
    return [curve[:shortest] for curve in curves]
