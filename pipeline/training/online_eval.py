"""Online evaluation: a picture of reconstructions and a cheap linear probe of the newest checkpoint during training. No Ray.

Each evaluation is a child process of the driver, of low priority, with one thread and without a GPU. Its CPU time is
counted, and the next one waits until all of them together are below `SHARE` of the time that training has run: an
evaluation takes that time from one worker at most, so even if all others wait for it, training slows down by no more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.recipe import Recipe
from pipeline.models.build import build_views
from pipeline.periodic import Periodic
from pipeline.shards.batches import sequential
from pipeline.shards.shard_set import ShardSet
from wavemim.inputs import Inputs
from wavemim.model import MaskedImageModel

_log = logging.getLogger(__name__)

PICTURES = "pictures"  # folder in the stage's, and of the artifacts
TRAIN_IMAGES, VAL_IMAGES = 2000, 1000  # of the probe, at most
STRENGTH, ITERATIONS = 0.1, 100  # of the probe: the same for all evaluations, so that they can be compared
SHARE = 0.02  # of the time that training runs, half of it for pictures and half for probes
FIRST_COST = 8.0  # CPU seconds that a kind of evaluation is assumed to cost until one was measured
LIMIT = 3600.0  # seconds that an evaluation may take
FAILURES = 3  # in a row, then there are no more evaluations
NICE = 10
PROBE_BATCH = 50

Log = Callable[[Mapping[str, float], int], None]
LogFile = Callable[[Path, str], None]


@dataclass
class CpuBudget:
    """CPU seconds that one kind of evaluation has used, and how many it may use."""

    share: float
    spent: float = 0.0
    cost: float = FIRST_COST  # of the next one

    def allows(self, elapsed: float) -> bool:
        """Whether another one is within the budget after training has run for `elapsed` seconds."""
        return self.spent + self.cost <= self.share * elapsed

    def charge(self, cost: float) -> None:
        """Record an evaluation that used `cost` CPU seconds."""
        self.spent += cost
        self.cost = cost


class OnlineEvaluator:
    """Decides when to evaluate, starts the evaluation, and logs the result. A failure only gives a warning."""

    def __init__(
        self,
        folder: Path,
        shards: str,
        *,
        labelled: bool,
        log: Log,
        artifact: LogFile,
        minutes: float,
        newest: Callable[[], Path | None] | None = None,
        share: float = SHARE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the evaluation of a stage's checkpoints.

        Args:
            folder: The stage's folder, which holds its checkpoints.
            shards: Path or URL of the shard set.
            labelled: Whether a probe is possible.
            log: Called with metrics and images seen.
            artifact: Called with a file and the artifact's folder.
            minutes: Between two evaluations, at least.
            newest: Returns the newest checkpoint; None: that in `folder`.
            share: Of the time of training that evaluations may take.
            clock: Seconds, monotonic.
        """
        self.folder, self.shards, self.labelled = folder, shards, labelled
        self.log, self.artifact = log, artifact
        self.seconds, self.clock = 60 * minutes, clock
        self.newest = newest or (lambda: newest_of(folder))
        self.pictures = CpuBudget(share / 2 if labelled else share)
        self.probes = CpuBudget(share / 2)
        self.began = clock()
        self.next = self.began + self.seconds
        self.last: Path | None = None  # checkpoint that was evaluated last
        self.failures, self.warned = 0, False
        self.stopped = threading.Event()
        self._child: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def evaluate_if_due(self) -> bool:
        """Evaluate the newest checkpoint if it is new and an evaluation is due; returns whether one was made."""
        now = self.clock()
        elapsed = now - self.began
        picture = self.pictures.allows(elapsed)
        # A probe has its own half of the budget; how much one costs is not known before the first.
        probe = self.labelled and self.probes.allows(elapsed)
        if now < self.next or not (picture or probe):
            return False
        path = self.newest()
        if path is None or path == self.last:
            return False
        file = self.folder / PICTURES / f"{path.name}.png"
        picture = picture and not file.is_file()  # of an earlier call
        if not (picture or probe):
            self.last = path
            return False
        self.next = now + self.seconds
        answer = self._run_child(
            {
                "checkpoint": str(path.absolute()),
                "shards": self.shards,
                "picture": str(file.absolute()) if picture else None,
                "probe": self.probes.share * elapsed - self.probes.spent if probe else None,
            }
        )
        if answer.get("gone"):  # it was removed meanwhile: there is a newer one
            self.next = now
            return False
        self.last = path
        self._log_results(answer, file)
        return True

    def _log_results(self, answer: Mapping[str, Any], file: Path) -> None:
        images, common = int(answer["images"]), float(answer["common"])
        if "picture" in answer:
            self.pictures.charge(common + answer["picture"])
            self.artifact(file, PICTURES)
            common = 0.0  # what both need is already charged
        if "probe" in answer:
            self.probes.charge(common + answer["probe"])
        metrics = dict(answer.get("metrics", {}))
        if "expected" in answer:  # too expensive for now
            self.probes.cost = answer["expected"]
        self.log({**metrics, "monitor/cpu_seconds": float(answer["total"])}, images)

    def _run_child(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Have a child process do `work`. Raises RuntimeError if that fails."""
        root = str(Path(__file__).resolve().parents[2])
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }
        with self._turn:
            if self.stopped.is_set():
                raise RuntimeError("it was stopped")
            self._child = subprocess.Popen(
                [sys.executable, "-m", "pipeline.training.online_eval"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the driver
            )
        began = time.monotonic()
        try:
            out, errors = self._child.communicate(json.dumps(job), timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()
            raise RuntimeError(f"it took longer than {LIMIT:.0f} s") from None
        finally:
            failed = self._child.returncode != 0
            self._child = None
            if failed:  # it has not reported its cost
                for asked, account in ((job["picture"], self.pictures), (job["probe"], self.probes)):
                    if asked is not None:
                        account.charge(time.monotonic() - began)
        if failed:
            lines = [line for line in errors.splitlines() if line.strip()]
            raise RuntimeError(lines[-1] if lines else "it ended without a message")
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer

    def attempt(self) -> bool:
        """Evaluate if it is due. Returns False once it has been stopped, or has failed too often."""
        try:
            if self.evaluate_if_due():
                self.failures = 0
        except Exception as error:  # whatever it is, it must not end the run
            self.failures += 1
            if self.stopped.is_set():
                return False
            if not self.warned:
                self.warned = True
                _log.warning("online evaluation failed: %s; training continues", error)
        return self.failures < FAILURES

    def stop(self) -> None:
        """End the running evaluation, and start no more."""
        with self._turn:
            self.stopped.set()
            child = self._child
        if child is not None:
            with contextlib.suppress(OSError):
                child.kill()


@contextlib.contextmanager
def monitoring(
    folder: Path,
    shards: str,
    *,
    labelled: bool,
    log: Log,
    artifact: LogFile,
    minutes: float | None,
    newest: Callable[[], Path | None] | None = None,
) -> Iterator[None]:
    """Evaluate during training while the block runs, as `OnlineEvaluator` does; not if `minutes` is None."""
    if minutes is None:
        yield
        return
    evaluator = OnlineEvaluator(
        folder, shards, labelled=labelled, log=log, artifact=artifact, minutes=minutes, newest=newest
    )
    thread = Periodic(evaluator.attempt, 1.0, name="online evaluation", join=10).start()
    try:
        yield
    finally:
        evaluator.stop()  # first: an evaluation may take long
        thread.stop()


def newest_of(folder: Path) -> Path | None:
    """The checkpoint in `folder` that has seen the most images, whole or not; None if there is none."""
    from wavemim.weights import checkpoint

    return next((path for _, path in checkpoint.seen(folder)), None)


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation, in the child process.

    Args:
        job: "checkpoint" and "shards"; "picture", a file or None; "probe", the CPU seconds that it may cost or None.

    Returns:
        Images seen, "metrics", and the CPU seconds spent on each part; "gone" if the checkpoint was removed meanwhile.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ShardError: The shard set cannot be read.
    """
    from pipeline.models.build import build_inputs, model_of_checkpoint
    from pipeline.shards.shard_set import ShardSet
    from wavemim.weights import checkpoint

    path = Path(job["checkpoint"])
    try:
        state = checkpoint.read_state(path, verify=False)
        name = checkpoint.AVERAGED if checkpoint.AVERAGED in state["files"] else checkpoint.MODEL
        if checkpoint.checksum(path / name) != state["files"][name]:
            raise checkpoint.CheckpointError(f"{path / name} is damaged")
        model, _, recipe = model_of_checkpoint(path)
    except (OSError, checkpoint.CheckpointError):
        if path.is_dir():
            raise
        return {"gone": True}
    shards = ShardSet.open(job["shards"])
    inputs = build_inputs(shards, state)
    model.eval()
    answer: dict[str, Any] = {"images": state["images"], "common": time.process_time(), "metrics": {}}
    if job["picture"] is not None:
        Path(job["picture"]).parent.mkdir(exist_ok=True)
        draw_val(Path(job["picture"]), model, inputs, recipe, shards)
        answer["picture"] = time.process_time() - answer["common"]
    if job["probe"] is not None:
        answer |= _probe(model, inputs, recipe, shards, job["probe"], 0.0 if "picture" in answer else answer["common"])
    return {**answer, "total": time.process_time()}


def _probe(model: Any, inputs: Any, recipe: Any, shards: Any, allowed: float, common: float) -> dict[str, Any]:
    """A linear probe within `allowed` CPU seconds, `common` of them spent; or its expected cost if that is more."""
    from pipeline.evaluation.features import features_of
    from wavemim.evaluation.probes import linear_probe

    def features(split: str, most: int) -> Any:
        window = recipe.encoder.image_size
        encoder = model.encoder.model
        return features_of(encoder, inputs, shards, split, window=window, batch=PROBE_BATCH, max_rows=most)

    counts = {"train": min(TRAIN_IMAGES, shards.rows["train"]), "val": min(VAL_IMAGES, shards.rows["val"])}
    first = min(PROBE_BATCH, counts["train"])
    features("train", first)  # warm-up: what is done only once is not measured
    began = time.process_time()
    width = features("train", first)[0].shape[1]
    each = (time.process_time() - began) / first
    solving = ITERATIONS * 6 * counts["train"] * width * len(shards.classes) / 5e9  # at 5 GFLOP/s
    expected = common + each * sum(counts.values()) + solving
    spent = time.process_time() - began
    if expected + spent > allowed:
        return {"expected": expected + spent, "probe": spent}
    train, val = (features(split, count) for split, count in counts.items())
    accuracy, _ = linear_probe(train, val, strengths=(STRENGTH,), seed=recipe.seed, max_iterations=ITERATIONS)
    metrics = {
        "monitor/linear_top1": accuracy.top1,
        "monitor/linear_top1_low": accuracy.low,
        "monitor/linear_top1_high": accuracy.high,
    }
    return {"metrics": metrics, "probe": time.process_time() - began}


def _child() -> None:
    os.nice(NICE)
    import torch

    torch.set_num_threads(1)
    answer = work(json.load(sys.stdin))
    print(json.dumps(answer), flush=True)


IMAGES = 4


def draw_val(path: Path, model: MaskedImageModel, inputs: Inputs, recipe: Recipe, shards: ShardSet) -> None:
    """Draw the reconstructions of `IMAGES` images of val, or of train if there is no val.

    Args:
        path: The PNG file to write.
        model: The model, which is left in evaluation mode.
        inputs: What turns a batch into images and coefficients.
        recipe: The settings of the model.
        shards: The shard set.
    """
    from wavemim.figures.reconstruction import reconstruction_figure  # needed at the end only, and slow to import

    split = "val" if shards.rows.get("val") else "train"
    batch = next(iter(sequential(shards, split, IMAGES, window=recipe.encoder.image_size, max_rows=IMAGES)))
    reconstruction_figure(
        path,
        model=model.eval(),
        views=build_views(recipe, model, inputs, augment=False),
        stored=batch.levels,
        rows=batch.rows,
        crop=batch.crop,
        names=[f"{split} row {row}" for row in batch.rows.tolist()],
    )


if __name__ == "__main__":
    _child()
