"""Commands of `wavemim` that are no stages: they look at what stages wrote, or mend it."""

from __future__ import annotations

import sys

import click

from pipeline.errors import EXIT_FAILED, SettingError


@click.command("verify", short_help="Compare every file of a shard set with its checksum.")
@click.argument("shards")
@click.option("--quiet", "-q", is_flag=True, help="no progress bar")
def _verify(shards: str, quiet: bool) -> None:
    """Compare every file of a shard set (folder or URL) with size and SHA-256 in its manifest; exit 1 if one differs."""
    from pipeline.inspect_shards import check

    if not check(shards, progress=not quiet):
        sys.exit(EXIT_FAILED)


@click.command("inspect", short_help="Say what is in a shard set, and draw it.")
@click.argument("shards")
@click.option("--picture", default="inspect.png", show_default=True, metavar="FILE.png", help="where it is drawn")
@click.option("--images", default=4, show_default=True, type=click.IntRange(1, 8), help="how many it shows")
@click.option("--json", "numbers", metavar="FILE", help="write the numbers there too")
@click.option("--quiet", "-q", is_flag=True, help="no progress bar")
def _inspect(shards: str, picture: str, images: int, numbers: str | None, quiet: bool) -> None:
    """Say what is in a shard set (folder or URL): classes, bytes, statistics, rejects, duplicates; and draw a picture."""
    from pipeline.inspect_shards import show

    show(shards, picture=picture, images=images, numbers=numbers, progress=not quiet)


@click.command("show", short_help="Draw what a trained model makes of your own pictures.")
@click.argument("checkpoint")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--out", default="show.png", show_default=True, metavar="FILE.png", help="where it is drawn")
@click.option(
    "--mask-ratio",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="share that is hidden  [default: the recipe's]",
)
@click.option("--seed", type=click.IntRange(min=0), help="of the mask  [default: the recipe's]")
def _show(checkpoint: str, images: tuple[str, ...], out: str, mask_ratio: float | None, seed: int | None) -> None:
    """Hide a part of each image, and draw what the model predicts: every level beside the truth, and the image rebuilt.

    CHECKPOINT is a checkpoint's folder, or that of a run (OUT/runs/NAME). Up to 16 images; of each the middle square.
    """
    from pipeline.show import show

    click.echo(show(checkpoint, images, out=out, mask_ratio=mask_ratio, seed=seed))


@click.command("replay", short_help="Look into the steps of a run that ended for gradients that are not finite.")
@click.argument("folder")
@click.option("--shards", metavar="FOLDER|URL", help="where the shard set is now  [default: where it was]")
def _replay(folder: str, shards: str | None) -> None:
    """Run the last steps of a run that blew up once more: losses per level, gradients, and the images that do it.

    FOLDER is the folder blow-up that such a run leaves, or that of the run (OUT/runs/NAME). Nothing is trained.
    """
    from pipeline.replay import replay

    replay(folder, shards=shards, say=click.echo)


@click.command("sync", short_help="Send to MLflow what it did not get while it was away.")
@click.argument("run")
@click.argument("settings", nargs=-1, metavar="[tracking.uri=URI]")
def _sync(run: str, settings: tuple[str, ...]) -> None:
    """Send the metrics, files and states that MLflow did not get; what it has is not sent again.

    RUN is a run's folder (OUT/runs/NAME), that of a stage in it, or OUT for all runs. Exit 1 if MLflow does not answer.
    """
    from pipeline.sync import sync

    uri = None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key != "tracking.uri" or not value:
            raise SettingError(f"{setting}: sync knows no setting but tracking.uri=URI")
        uri = value
    sync(run, uri=uri, say=click.echo)


TOOLS = (_verify, _inspect, _show, _replay, _sync)
