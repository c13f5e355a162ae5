"""`wavemim verify`: compare a shard set with its manifest."""

from __future__ import annotations

import sys

import click

from pipeline.errors import EXIT_FAILED


@click.command("verify")
@click.argument("shards")
@click.option("--quiet", "-q", is_flag=True, help="no progress bar")
def command(shards: str, quiet: bool) -> None:
    """Compare every file of a shard set (folder or URL) with the size and SHA-256 in its manifest.

    Every damaged file is listed. Exit code 1 if there is one.
    """
    from pipeline.shards.verify import check

    if not check(shards, progress=not quiet):
        sys.exit(EXIT_FAILED)
