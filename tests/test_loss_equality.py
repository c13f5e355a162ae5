"""Losses and final weights of short runs are those that were recorded: what a refactoring must not change.

With the recorded versions and type of CPU they are compared bit for bit. Elsewhere they are too if they happen to be
equal; if not, losses are compared within the tolerances below, and weights are not compared. A warning says so.

The tolerances: between ATen's plainest and its AVX-512 kernels, with and without oneDNN, float32 losses of these cases
differ by up to 8e-6 in the first five steps and, as AdamW amplifies rounding errors, by up to 2e-4 later; bfloat16 ones by
5e-4. A mistake in a step, such as a mask, a weight or a learning rate that is another one, is far above these.
"""

import json
import warnings

import pytest
from loss_equality.record import RECORDED, measured

EARLY, EARLY_STEPS, LATE, BFLOAT16 = 5e-5, 5, 1e-3, 5e-3  # relative

recorded = json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found():
    """All cases as this code computes them: within a minute on one core."""
    content = measured()
    differing = [key for key, value in recorded["fingerprint"].items() if content["fingerprint"][key] != value]
    cases = recorded["cases"]
    content["exact"] = not differing
    if differing and any(content["cases"][name] != cases[name] for name in cases if name in content["cases"]):
        warnings.warn(
            f"other {', '.join(differing)} than recorded: losses are compared within tolerances, weights not at all",
            stacklevel=1,
        )
    return content


def numbers(case, name):
    return [float.fromhex(value) for value in case["metrics"][name].split()]


@pytest.mark.parametrize("name", recorded["cases"])
def test_equal_to_the_recorded_run(found, name):
    expected, case = recorded["cases"][name], found["cases"][name]
    if case == expected:
        return
    assert set(case["metrics"]) == set(expected["metrics"])
    losses = [metric for metric in expected["metrics"] if metric.startswith("train/loss")]
    assert losses
    for metric in losses if not found["exact"] else sorted(expected["metrics"], key=losses.__contains__, reverse=True):
        assert len(numbers(case, metric)) == len(numbers(expected, metric)), metric
        for step, (value, right) in enumerate(zip(numbers(case, metric), numbers(expected, metric), strict=True), 1):
            tolerance = BFLOAT16 if "bfloat16" in name else EARLY if step <= EARLY_STEPS else LATE
            allowed = 0 if found["exact"] else tolerance * abs(right)
            assert abs(value - right) <= allowed, f"{metric}: step {step}: {value!r}, recorded {right!r}"
    if found["exact"]:
        assert case["sha256"] == expected["sha256"], "the logged losses are equal, the weights or moments are not"


def test_every_recipe_is_recorded(found):
    assert set(found["recipes"]) <= set(recorded["cases"])
    assert set(found["cases"]) == set(recorded["cases"]), "record what is missing: python tests/loss_equality/record.py"


def test_each_run_has_twenty_steps_and_learns_something():
    for name, case in recorded["cases"].items():
        losses = numbers(case, "train/loss")
        assert len(losses) == (8 if "resumes from" in name else 20), name
        if "fine-tuning" not in name and "resumes from" not in name:
            assert sum(losses[-5:]) < sum(losses[:5]), name


def test_the_smallest_change_is_noticed(found):
    """One weight of the loss by one unit in the last place of float32."""
    plain, probe = found["cases"]["two levels"], found["probe"]
    assert plain["sha256"]["model"] != probe["sha256"]["model"]
    for metric in plain["metrics"]:
        assert numbers(probe, metric) == pytest.approx(numbers(plain, metric), rel=LATE)


def test_equal_settings_give_equal_numbers():
    """Recipes that differ only in the length of training, or in nothing, are the same run here."""
    assert recorded["cases"]["two levels"] == recorded["cases"]["tiny_imagenet"]
    assert recorded["cases"]["small"] == recorded["cases"]["small_wavelet"]
