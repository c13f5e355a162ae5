"""Tables and claims of evidence.py, from curves with known accuracies."""

import base64
from argparse import Namespace
from importlib import import_module

import numpy as np
import pytest

N = 2000


@pytest.fixture
def report(benchmarks):
    return import_module("evidence_report")


def curve(*top1, cost=1.0, seed=0):
    """Probes after 0, 100, 200, … images with these accuracies in %; nested sets of images plus some that flip by seed."""
    order = np.random.default_rng(1).permutation(N)
    points = []
    for number, value in enumerate(top1):
        correct = np.zeros(N, bool)
        correct[order[: round(value / 100 * N)]] = True
        flipped = np.random.default_rng((seed, number)).choice(N, 6, replace=False)
        correct[flipped[:3]], correct[flipped[3:]] = True, False
        packed = base64.b64encode(np.packbits(correct).tobytes()).decode()
        images = 100 * number
        points.append(
            {"images": images, "seconds": cost * images, "flops": 1e12 * cost * images, "top1": 100 * correct.mean()}
            | {"low": 0.0, "high": 100.0, "n": N, "correct": packed}
        )
    return points


def runs(*top1, cost=1.0, first_seed=0):
    return [curve(*top1, cost=cost, seed=first_seed + seed) for seed in range(3)]


def test_verdicts(report):
    same, better = runs(20, 40, 50), runs(20, 45, 55, first_seed=5)
    results = {"a": same, "better": better, "same": runs(20, 40, 50, first_seed=9), "none": [None, None, None]}
    found = report.differences(results, dict.fromkeys(results, "a"))
    words = {name: report.verdict(one["images"]) for name, one in found.items()}
    assert words["better"] == "better"
    assert report.verdict(report.compare(same, better)) == "worse"
    assert words["none"] == "not comparable"
    excluded = found["same"]["images"]
    assert words["same"] == f"does nothing (more than {max(-excluded.low, excluded.high):.1f} points excluded)"
    assert "a" not in found


def test_table_has_a_line_for_each_variant_at_equal_budgets(report):
    results = {"a": runs(20, 40, 50), "dear": runs(20, 45, 55, cost=2.0, first_seed=5), "none": [None] * 3}
    rows = [line.split(" | ") for line in report.table(results, dict.fromkeys(results, "a")).splitlines()]
    lines = {row[0].strip("| "): row for row in rows}
    dear = lines["dear"]
    by_budget = [float(cell.split(" ")[0]) for cell in dear[2:5]]
    assert by_budget == pytest.approx([5, -5, -5], abs=0.3)
    assert dear[5:] == ["better", "0", "400 |"]
    assert lines["a"][5] == "baseline"
    assert "not run" in lines["none"][1]
    assert "untrained" in lines
    cells = {line.count("|") for line in report.table(results, {}).splitlines() if line.startswith("|")}
    assert len(cells) == 1, "rows of unequal length"


def test_one_seed_is_said_to_leave_out_other_seeds(report):
    results = {"a": runs(20, 40)[:1], "b": runs(20, 41)[:1]}
    assert "another seed" in report.table(results, dict.fromkeys(results, "a"))
    assert "over images and seeds" in report.table({"a": runs(20, 40), "b": runs(20, 41)}, {"a": "a", "b": "a"})


@pytest.mark.parametrize(
    ("wavelet", "holds"),
    [
        ((20, 42, 50), True),  # as good at the end, ahead at half
        ((20, 38, 50), False),  # behind at half
        ((20, 42, 49), False),  # behind at the end
    ],
)
def test_target_alone_is_judged_against_the_best_pixel_target(report, wavelet, holds):
    results = {"wavelet": runs(*wavelet, first_seed=7), "pixels": runs(20, 30, 35), "pixels, other": runs(20, 40, 50)}
    claim = report.target_alone(results)
    assert claim["against"] == "pixels, other"
    assert claim["holds"] is holds
    assert claim["end"]["points"] == pytest.approx(wavelet[-1] - 50, abs=0.3)
    assert claim["half"]["points"] == pytest.approx(wavelet[1] - 40, abs=0.3)
    assert claim["half"]["at"] == 100


def test_the_recipe_is_judged_by_what_it_needs_of_maes_budget(report):
    mae = runs(20, 30, 40, 50, cost=2.0)  # 600 in all
    fast = report.whole_recipe({"recipe": runs(20, 40, 51, 53, first_seed=5), "mae": mae})
    assert fast["flops"]["share"] == pytest.approx(190 / 600, abs=0.02)
    assert fast["seconds"]["difference"]["points"] == pytest.approx(1.8, abs=0.3)  # after 240: 51.8 against 50
    assert fast["holds"]
    slow = report.whole_recipe({"recipe": runs(20, 30, 40, 51, first_seed=5), "mae": mae})
    assert slow["flops"]["share"] == pytest.approx(290 / 600, abs=0.02) and not slow["holds"]
    never = report.whole_recipe({"recipe": runs(20, 30, 40, 41, first_seed=5), "mae": mae})
    assert never["seconds"]["share"] is None and not never["holds"]
    short = report.whole_recipe({"recipe": runs(20, 51, first_seed=5), "mae": mae})  # ends before 0.4 of MAE's
    assert short["holds"] and short["flops"]["difference"]["points"] == pytest.approx(1, abs=0.3)


def test_goals_and_their_lines(report):
    results = {
        "wavelet": runs(20, 42, 50, first_seed=7),
        "pixels": runs(20, 40, 50),
        "mae": runs(20, 30, 50, cost=2.0),
        "recipe": runs(20, 49, 52),
    }
    claims, goals = report.claims_of(results)
    assert set(goals) == {
        "wavelet_training_to_reach_best_pixel",
        "target_alone_difference_end",
        "target_alone_difference_half",
        "recipe_flops_share",
        "recipe_time_share",
    }
    text = report.claim_lines(claims)
    assert "`target_alone` holds" in text and "`recipe` holds" in text and "MAE's 50.0 % are reached in 0.3" in text
    assert report.claims_of({"pixels": runs(20, 30)}) == ({}, {})
    assert report.claims_of({"wavelet": [None], "pixels": [None], "mae": [None], "recipe": [None]}) == ({}, {})


def test_training_share_compares_with_the_better_of_the_pixel_targets(report):
    def plain(*top1):
        return [[{"images": 100 * i, "top1": value} for i, value in enumerate(top1)]]

    results = {"wavelet": plain(10, 30, 50), "pixels": plain(10, 15, 20), "pixels, last": plain(10, 20, 30)}
    assert report.training_share(results) == pytest.approx(100 / 200)
    assert report.training_share({**results, "wavelet": plain(10, 12, 14)}) is None
    assert report.training_share({**results, "wavelet": plain(10, 30, 20)}) == pytest.approx(0.5)  # on the way


def test_fine_tuned_variants_are_paired_by_seed(report):
    one, two = (curve(value, seed=seed)[0] for value, seed in ((50, 0), (60, 1)))
    text = report.tuned_table({"a": [one, one], "b": [two, None], "c": [None, None]}, dict.fromkeys("abc", "a"))
    assert "| b | 59.9 (59.9) | +9.75 [+8.42, +11.08] | better |" in text
    assert "| a | 50.1 (50.1, 50.1) |  | baseline |" in text and "| c | not run" in text


def test_plot_has_three_panels(report, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "close", shown.append)
    report.draw(tmp_path / "plot.png", {"a": runs(20, 40, 50), "b": [*runs(20, 45)[:1], None, None], "c": [None] * 3})
    (figure,) = shown
    assert [axis.get_xlabel() for axis in figure.axes] == ["images seen", "TFLOP of training", "seconds of training"]
    assert all(len(axis.lines) == 2 and len(axis.collections) == 2 for axis in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert max(figure.axes[1].lines[0].get_xdata()) == 200
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_variants_that_differ_in_more_than_the_target_decide_no_claim(report, tmp_path):
    evidence, variants = import_module("evidence"), import_module("evidence_variants")
    both = {name: variants.Variant(name) for name in ("wavelet", "pixels")}
    found = evidence.Found(
        {"wavelet": runs(20, 40), "pixels": runs(20, 41), "pixels, 4 masks an image": runs(20, 50)}, {}
    )
    shown = evidence._Report(Namespace(json=tmp_path / "e.json", plot=tmp_path / "e.png"))
    shown.add("levers", both, found)
    assert shown.more["claims"] == shown.more["goals"] == {}
    shown.add("claims", both, found)
    assert "target_alone" in shown.more["claims"]
