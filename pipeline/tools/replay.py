"""`wavemim replay`: analyse the steps of a run that ended with non-finite gradients."""

from __future__ import annotations

import click


@click.command("replay")
@click.argument("folder")
@click.option("--shards", metavar="FOLDER|URL", help="where the shard set is now  [default: where it was]")
def command(folder: str, shards: str | None) -> None:
    """Repeat the last steps of a run that ended with non-finite gradients, and report losses per level, gradients and
    the images that cause it.

    FOLDER is the folder blow-up that such a run leaves, or that of the run (OUT/runs/NAME), local or in a store. Nothing
    is trained.
    """
    from pipeline.tools.replay_steps import replay  # loads torch, which --help need not wait for

    replay(folder, shards=shards, say=click.echo)
