"""Resumes the interrupted pretraining of a copied out folder by the loop alone, without Ray.

Arguments: the out folder, the file for the result (JSON: digests of the final checkpoint, and the logged losses).
Started by tests/test_specimens.py in the environment in which the specimens were made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from loss_equality.digests import digests

# All that is imported of the project.
from pipeline.config.load import load
from pipeline.shards.shard_set import ShardSet
from pipeline.training.pretrain_loop import train
from wavemim.weights import checkpoint


def main() -> None:
    """The command."""
    out, file = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    stage, final = out / "runs" / "old" / "pretrain", out / "final"
    losses: list[float] = []

    def keep(saver: Any, state: dict[str, Any]) -> None:
        saver(final)

    train(
        load(str(Path(__file__).with_name("specimen.yaml")), [f"out={out}", "name=old"]),
        ShardSet.open(out / "shards"),
        device=torch.device("cpu"),
        resume=checkpoint.latest(stage),
        on_log=lambda metrics, images: losses.append(metrics["train/loss"]),
        on_checkpoint=keep,
    )
    file.write_text(json.dumps({"sha256": digests(final), "losses": losses}))


if __name__ == "__main__":
    main()
