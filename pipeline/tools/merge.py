"""`wavemim merge`: make one shard set of several."""

from __future__ import annotations

import click


@click.command("merge")
@click.argument("folder")
@click.option("--quiet", "-q", is_flag=True, help="no progress bar")
def command(folder: str, quiet: bool) -> None:
    """Make one shard set of the sets that lie in the folders of FOLDER (a path or URL).

    Their files are neither changed nor copied: only FOLDER/manifest.json and FOLDER/rejected.parquet are written. Run it
    again after another set was added.
    """
    from pipeline.shards.merge import merge

    shards = merge(folder, progress=not quiet)
    counts, rows = shards.manifest["counts"], ", ".join(f"{rows:,} {split}" for split, rows in shards.rows.items())
    labels = "unlabelled" if shards.classes is None else f"{len(shards.classes):,} classes"
    click.echo(
        f"merge: {len(shards.parts):,} sets with {counts['kept']:,} images ({rows}; {labels}), "
        f"{counts['rejected']:,} rejected → {shards.url}"
    )
