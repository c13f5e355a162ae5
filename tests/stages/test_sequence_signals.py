"""A stage that leaves a signal handler behind, as Ray Train does, does not take Ctrl-C from the next stage."""

import contextlib
import signal
from types import SimpleNamespace

import pytest

from pipeline.config.load import load
from pipeline.stages import sequence


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_handlers_that_a_stage_leaves_are_replaced_before_the_next_stage(monkeypatch, number, name):
    monkeypatch.setattr(sequence, "ray_session", lambda cluster: contextlib.nullcontext(SimpleNamespace(private=True)))

    def takes(recipe, session, checked, *, progress):
        signal.signal(number, lambda *_: None)
        return {}

    def is_interrupted(recipe, session, checked, *, progress):
        signal.raise_signal(number)
        raise AssertionError(f"{name} was swallowed")

    def stage(run):
        return SimpleNamespace(CHECKS=(), check=lambda recipe: None, run=run, summary=lambda recipe, result: "")

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            sequence.run_stages({"first": stage(takes), "second": stage(is_interrupted)}, load("small"), progress=False)
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
