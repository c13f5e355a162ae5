"""`wavemim embed`: features of any images, written to one Parquet file, through Ray Data.

The inputs of all sources are cut into units in their order. One task decodes a unit, another one (on GPUs an actor that
keeps the encoder) computes its features; this process writes them in order as they arrive, so that memory does not grow
with the number of images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError, StageError
from pipeline.runtime import interrupts
from pipeline.runtime.out_folder import check_writable
from pipeline.runtime.ray_session import SessionInfo, ray_session
from pipeline.tools.arguments import Output
from pipeline.tools.embed_file import Writer, parent_of, rejected_of
from pipeline.tools.embed_sources import Source, plan_images, units_of

if TYPE_CHECKING:
    from pipeline.models.encoder_source import EncoderSource


@click.command("embed")
@click.argument("checkpoint")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option(
    "--out",
    required=True,
    type=Output(url=True),
    metavar="FILE.parquet",
    help="the file with the features, a path or URL",
)
@click.option("--overwrite", is_flag=True, help="replace an existing file")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="images per forward pass")
@click.option("--image-column", metavar="NAME", help="column of a list or of Parquet that names or holds the image")
@click.option("--label-column", metavar="NAME", help="column of a list or of Parquet that holds the label")
@click.option("--quiet", "-q", is_flag=True, help="no progress bar")
def command(
    checkpoint: str,
    images: tuple[str, ...],
    out: str,
    overwrite: bool,
    batch: int,
    image_column: str | None,
    label_column: str | None,
    quiet: bool,
) -> None:
    """Write the features of images, one row per image: source, path, label if known, embedding.

    CHECKPOINT is the folder of a checkpoint or of a run (OUT/runs/NAME), a folder in timm's format, or timm:NAME. IMAGES
    are folders, single images, lists (.csv, .tsv, .parquet), Parquet or tar files that hold images; local or s3://….
    Each image is cropped to its central square. Unreadable images are listed in FILE.rejected.parquet with the reason.
    Runs on the Ray cluster that RAY_ADDRESS names, otherwise on this machine.
    """
    check_out(out, overwrite=overwrite)
    sources = plan_images(images, image_column=image_column, label_column=label_column)
    subject = subject_named(checkpoint)
    with ray_session(load().cluster) as session:
        done = embed(subject, sources, out, session, batch=batch, progress=not quiet)
        rejected = f", {done['rejected']:,} rejected (see {done['rejects']})" if done["rejected"] else ""
        click.echo(f"embed: {done['images']:,} images{rejected} → {done['path']}")
        interrupts.finished()  # before Ray is shut down


def embed(
    subject: EncoderSource,
    sources: Sequence[Source],
    out: str,
    session: SessionInfo,
    *,
    batch: int = 64,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the features of all images to a Parquet file, and unreadable images to ``….rejected.parquet`` next to it.

    Columns: source, path, label (null if unknown), embedding (F float32); rows are in the order of the sources. Nothing
    partial is left where it fails.

    Args:
        subject: The encoder.
        sources: The images.
        out: The file, a path or URL.
        session: The Ray session.
        batch: Images per forward pass.
        progress: Whether a progress bar is shown.

    Returns:
        "path", "images" (their number), "rejected" (their number) and "rejects" (their file, or None).

    Raises:
        StageError: No image could be read, or a task failed.
    """
    from pipeline.tools.embed_task import features_of  # loads Ray and torch, which mistakes need not wait for

    units = [unit for source in sources for unit in units_of(source)]
    rejects = [(source.name, *reject) for source in sources for reject in source.plan.rejects]
    target, name = parent_of(out)
    with (
        contextlib.closing(features_of(subject, units, session, batch)) as done,  # while there is a Ray
        Writer(target, name, subject) as writer,
    ):
        total = sum(len(unit.rows) for unit in units)
        with tqdm(total=total, desc="embed", unit=" image", disable=not progress) as bar:
            for unit in units:
                rejects += writer.write(unit, done)
                bar.update(len(unit.rows))
        if not writer.rows:
            first = "; the first reject: {}: {}".format(*rejects[0][1:]) if rejects else ""
            raise StageError(f"no image could be embedded of {len(rejects)}{first}")
        writer.finish(rejects)
    listed = target.shown(rejected_of(name)) if rejects else None
    return {"path": target.shown(name), "images": writer.rows, "rejected": len(rejects), "rejects": listed}


def check_out(out: str, *, overwrite: bool) -> None:
    """Raise SettingError where `out` cannot be written, or exists and `overwrite` is False."""
    folder, name = parent_of(out)
    if not name.endswith(".parquet"):
        raise SettingError(f"--out {out}: the name has to end in .parquet")
    kind = folder.kind(name)
    if kind == "folder" or (kind and not overwrite):
        hint = "is a folder; use another name" if kind == "folder" else "already exists; --overwrite replaces it"
        raise SettingError(f"--out {out}: {folder.shown(name)} {hint}")
    if folder.local is not None and not folder.local.is_dir():
        raise SettingError(f"--out {out}: the folder '{folder.local}' does not exist")
    check_writable("--out", folder)


def subject_named(checkpoint: str) -> EncoderSource:
    """The encoder of a checkpoint or a run, ``timm:NAME``, or a folder in timm's format. Raises SettingError."""
    from pipeline.models.encoder_source import find_encoder

    place = Path(checkpoint)
    with_pretrain = place / "pretrain"  # a run's folder
    named = str(with_pretrain) if with_pretrain.is_dir() and not (place / "config.json").is_file() else checkpoint
    return find_encoder(with_overrides(load("small"), {"checkpoint": named}), None)
