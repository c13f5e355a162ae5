"""Commands of `wavemim` that are no stages: they look at what stages wrote, or mend it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.errors import EXIT_FAILED, SettingError
from pipeline.shards.shard_set import MANIFEST


@click.command("verify", short_help="Compare every file of a shard set with its checksum.")
@click.argument("shards")
@click.option("--quiet", "-q", is_flag=True, help="no progress bar")
def _verify(shards: str, quiet: bool) -> None:
    """Compare every file of a shard set (folder or URL) with size and SHA-256 in its manifest; exit 1 if one differs."""
    from pipeline.shards.verify import check

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
    from pipeline.tools.inspect_shards import show

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

    CHECKPOINT is a checkpoint's folder, or that of a run (OUT/runs/NAME), or a URL of either, which is copied to
    wavemim-out/fetched. Up to 16 images; of each the middle square.
    """
    from pipeline.tools.show import show

    click.echo(show(checkpoint, images, out=out, mask_ratio=mask_ratio, seed=seed))


@click.command("replay", short_help="Look into the steps of a run that ended for gradients that are not finite.")
@click.argument("folder")
@click.option("--shards", metavar="FOLDER|URL", help="where the shard set is now  [default: where it was]")
def _replay(folder: str, shards: str | None) -> None:
    """Run the last steps of a run that blew up once more: losses per level, gradients, and the images that do it.

    FOLDER is the folder blow-up that such a run leaves, or that of the run (OUT/runs/NAME). Nothing is trained.
    """
    from pipeline.tools.replay import replay

    replay(folder, shards=shards, say=click.echo)


@click.command("sync", short_help="Send to MLflow what it did not get while it was away.")
@click.argument("run")
@click.argument("settings", nargs=-1, metavar="[tracking.uri=URI]")
def _sync(run: str, settings: tuple[str, ...]) -> None:
    """Send the metrics, files and states that MLflow did not get; what it has is not sent again.

    RUN is a run's folder (OUT/runs/NAME), that of a stage in it, or OUT for all runs. Exit 1 if MLflow does not answer.
    """
    from pipeline.tools.sync import sync

    sync(run, uri=_uri(settings, "sync"), say=click.echo)


@click.command("compare", short_help="Show runs side by side: settings that differ, metrics, cost; and draw them.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN... [tracking.uri=URI]")
@click.option("--plot", default="compare.png", show_default=True, metavar="FILE.png", help="where it is drawn")
@click.option("--json", "numbers", metavar="FILE", help="write the numbers there too")
@click.option("--metric", multiple=True, metavar="NAME", help="what is drawn  [default: an accuracy and the loss]")
def _compare(runs: tuple[str, ...], plot: str, numbers: str | None, metric: tuple[str, ...]) -> None:
    """Show what differs between runs, what came out with intervals, and what it cost; all of it read from MLflow.

    RUN is a run's name (name=), its folder (OUT/runs/NAME), or an MLflow run's name or id. Without tracking.uri= the
    store is that of the folder, MLFLOW_TRACKING_URI, or wavemim-out/mlflow.db. Exit 1 if MLflow does not answer.
    """
    names = [run for run in runs if not run.startswith("tracking.")]
    uri = _uri([run for run in runs if run.startswith("tracking.")], "compare")
    if not names:
        raise SettingError("compare needs one run or more: names, folders (OUT/runs/NAME) or ids of MLflow's")
    from pathlib import Path

    from pipeline.tools.compare import compare

    click.echo(compare(names, uri=uri, plot=Path(plot), numbers=Path(numbers) if numbers else None, metrics=metric))


def _uri(settings: Sequence[str], command: str) -> str | None:
    """The only setting that some tools know. Raises SettingError."""
    uri = None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key != "tracking.uri" or not value:
            raise SettingError(f"{setting}: {command} knows no setting but tracking.uri=URI")
        uri = value
    return uri


@click.command("embed", short_help="Write features of images to a Parquet file.")
@click.argument("checkpoint")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--out", required=True, metavar="FILE.parquet", help="where they are written, a path or URL")
@click.option("--overwrite", is_flag=True, help="replace what is there")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="images in a forward pass")
@click.option("--image-column", metavar="NAME", help="column of a list or of Parquet that names or holds the image")
@click.option("--label-column", metavar="NAME", help="column of a list or of Parquet that holds the label")
@click.option("--quiet", "-q", is_flag=True, help="no progress bar")
def _embed(
    checkpoint: str,
    images: tuple[str, ...],
    out: str,
    overwrite: bool,
    batch: int,
    image_column: str | None,
    label_column: str | None,
    quiet: bool,
) -> None:
    """Write the features of images, one row each: source, path, label where it is known, embedding.

    CHECKPOINT is a checkpoint's folder, that of a run (OUT/runs/NAME), a folder in timm's format, or timm:NAME. IMAGES
    are folders, single images, lists (.csv, .tsv, .parquet), Parquet or tar files that hold images; local or s3://….
    Of each image the middle square. What cannot be read is listed in FILE.rejected.parquet with the reason. On the Ray
    cluster that RAY_ADDRESS names, otherwise on this machine.
    """
    from pipeline.config.load import load
    from pipeline.runtime.ray_session import ray_session
    from pipeline.tools.embed import check_out, embed, plan_images, subject_named

    check_out(out, overwrite=overwrite)
    sources = plan_images(images, image_column=image_column, label_column=label_column)
    subject = subject_named(checkpoint)
    with ray_session(load().cluster) as session:
        done = embed(subject, sources, out, session, batch=batch, progress=not quiet)
    rejected = f", {done['rejected']:,} rejected (see {done['rejects']})" if done["rejected"] else ""
    click.echo(f"embed: {done['images']:,} images{rejected} → {done['path']}")


@click.command("import", short_help="Turn published weights of a ViT (MAE's format, DeiT's) into a timm folder.")
@click.argument("file")
@click.argument("out")
@click.option("--heads", type=click.IntRange(min=1), help="attention heads  [default: those of published sizes]")
@click.option("--mean", metavar="M,M,M", help="of pixels in [0, 1], a channel each  [default: ImageNet's]")
@click.option("--std", metavar="S,S,S", help="the same for their standard deviation")
@click.option("--overwrite", is_flag=True, help="replace what is there")
def _import(file: str, out: str, heads: int | None, mean: str | None, std: str | None, overwrite: bool) -> None:
    """Write the encoder in FILE (.pth, .safetensors) as the folder OUT: for encoder.pretrained=OUT, checkpoint=OUT, timm.

    Sizes are seen in the weights; decoder and classifier are left out. A .pth file is opened as weights alone: one that
    would run code is refused.
    """
    from pathlib import Path

    from wavemim.weights.mae_import import import_vit

    if not out or "://" in out:
        raise SettingError(f"OUT '{out}': a folder on this machine is needed")
    folder = Path(out).absolute()
    there = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if there and not (overwrite and (folder / "config.json").is_file()):
        hint = "is there already; --overwrite replaces it" if not overwrite else "is none that import wrote"
        raise SettingError(f"{out} {hint}")
    try:
        found = import_vit(Path(file), folder, heads=heads, mean=_numbers("mean", mean), std=_numbers("std", std))
    except ValueError as error:
        raise SettingError(str(error)) from None
    made = found["model_args"]
    click.echo(
        f"import: {found['architecture']}, width {made['embed_dim']}, {made['depth']} blocks, {made['num_heads']} heads, "
        f"patches of {made['patch_size']} in {made['img_size']} pixels → {out}"
    )


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        raise SettingError(f"--{option} {text}: give a number for each channel, with commas between them") from None


TOOLS = (_verify, _inspect, _show, _replay, _sync, _compare, _embed, _import)

PNG = b"\x89PNG\r\n\x1a\n"


def check_target(path: Path, *, picture: bool) -> None:
    """Raise SettingError unless a file can be written there; a picture replaces nothing but a PNG."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise SettingError(f"'{path}' cannot be written: {'a folder' if path.is_dir() else 'its folder is not there'}")
    if path.absolute().parent.joinpath(MANIFEST).is_file():
        raise SettingError(f"'{path}' lies in a shard set; give a place outside of it")
    if not picture and path.suffix.lower() != ".json":
        raise SettingError(f"numbers '{path}': JSON is written, give a name that ends with .json")
    if picture and path.suffix.lower() != ".png":
        raise SettingError(f"picture '{path}': a PNG is written, give a name that ends with .png")
    if picture and path.exists() and not path.read_bytes().startswith(PNG):
        raise SettingError(f"picture '{path}' is there and is no PNG; give another name")
