"""Steps that were left out and losses that leap: found, counted, and the end of a run that does nothing else."""

import pytest
import torch

from pipeline.training.divergence import REMEMBERED, DivergedError, DivergenceWatch

NAN = float("nan")


def watch_of(**changes):
    return DivergenceWatch(["level 2", "level 3"], torch.device("cpu"), 1, **{"every": 10, "max_skipped": 3, **changes})


def feed(watch, steps, start=0):
    for number, (losses, norm) in enumerate(steps, start):
        rows = torch.arange(4) + 10 * number
        watch.add(number, number // 100, rows, torch.tensor(losses), torch.tensor(norm))


GOOD, BAD = ([0.5, 0.5], 1.0), ([0.5, NAN], NAN)


def test_left_out_steps_are_counted_over_looks():
    watch = watch_of()
    feed(watch, [GOOD, BAD, GOOD])
    assert watch.report(0.1).skipped == 1
    feed(watch, [BAD, BAD])
    assert watch.report(0.1).skipped == 2
    assert watch.skipped == 3
    assert watch.report(0.1).skipped == 0  # nothing new
    feed(watch, [BAD, GOOD])
    assert (watch.skipped, watch.skipped_so_far()) == (3, (4, 0))  # what a checkpoint between two looks has to say
    watch.report(0.1)
    assert (watch.skipped, watch.skipped_so_far()) == (4, (4, 0))
    feed(watch, [BAD])
    assert watch.skipped_so_far() == (5, 1)
    watch.report(0.1)
    feed(watch, [BAD, BAD])
    assert watch.skipped_so_far() == (7, 3)


def test_a_row_of_them_ends_the_run_and_a_good_step_ends_the_row():
    watch = watch_of()
    feed(watch, [BAD] * 3 + [GOOD] + [BAD] * 3)
    watch.report(0.1)
    feed(watch, [BAD], start=7)
    with pytest.raises(DivergedError) as caught:
        watch.report(0.003)
    message = str(caught.value)
    assert "4 steps in a row" in message and "step 7" in message and "the loss of level 3" in message
    assert "learning rate 0.003" in message and "\n" not in message
    assert [line["step"] for line in caught.value.steps] == [4, 5, 6, 7]
    assert caught.value.steps[0]["rows"] == [40, 41, 42, 43]


def test_a_row_goes_on_where_training_was_resumed():
    watch = watch_of()
    watch.skipped, watch.before = 3, 3
    feed(watch, [BAD])
    with pytest.raises(DivergedError, match="4 steps in a row were skipped"):
        watch.report(0.1)
    watch = watch_of()
    watch.skipped, watch.before = 3, 3
    feed(watch, [GOOD, BAD, BAD, BAD])
    assert watch.report(0.1, total_steps=7).skipped == 3
    assert watch.skipped_so_far() == (6, 3)


def test_a_training_that_ends_in_more_left_out_steps_than_all_others_has_failed():
    watch = watch_of()
    feed(watch, [BAD, BAD])
    with pytest.raises(DivergedError, match="2 steps in a row were skipped"):
        watch.report(0.1, total_steps=2)
    watch = watch_of()
    feed(watch, [GOOD, BAD])
    assert watch.report(0.1, total_steps=2).skipped == 1  # no more than half
    watch = watch_of()
    feed(watch, [GOOD, BAD, BAD])
    assert watch.report(0.1).skipped == 2  # it goes on
    feed(watch, [BAD], start=3)
    with pytest.raises(DivergedError, match="3 steps in a row were skipped, up to step 3"):
        watch.report(0.1, total_steps=5)
    watch = watch_of()
    feed(watch, [BAD, GOOD, BAD])
    assert watch.report(0.1, total_steps=3).skipped == 2  # not in a row


def test_a_gradient_alone_is_named():
    watch = watch_of(max_skipped=1)
    feed(watch, [([0.5, 0.5], float("inf"))] * 2)
    with pytest.raises(DivergedError, match="norm is inf, the losses are finite"):
        watch.report(0.1)


def test_spikes_are_named_with_their_images_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    watch = watch_of(every=REMEMBERED)
    noise = [([0.5 + 0.01 * float(torch.randn((), generator=generator)), 0.5], 1.0) for _ in range(REMEMBERED)]
    feed(watch, noise)
    assert len(watch.report(0.1).spikes) <= 2  # of 200 normal numbers hardly any lies beyond 6 median distances
    feed(watch, [GOOD, ([3.0, 0.5], 9.0), GOOD], start=REMEMBERED)
    (spike,) = watch.report(0.1).spikes
    assert spike["step"] == REMEMBERED + 1 and spike["times"] > 50
    assert spike["rows"] == [10 * (REMEMBERED + 1) + i for i in range(4)]


def test_a_falling_loss_is_no_spike():
    watch = watch_of(every=100)
    feed(watch, [([2.0 - 0.01 * i, 1.0], 1.0) for i in range(100)])
    assert watch.report(0.1).spikes == []
