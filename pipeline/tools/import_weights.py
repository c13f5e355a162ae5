"""`wavemim import`: published weights of a ViT → a folder in timm's format."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.errors import SettingError
from pipeline.tools.arguments import Output


@click.command("import")
@click.argument("file")
@click.argument("out", type=Output())
@click.option("--heads", type=click.IntRange(min=1), help="attention heads  [default: as in the published sizes]")
@click.option("--mean", metavar="M,M,M", help="mean of pixels in [0, 1], per channel  [default: ImageNet's]")
@click.option("--std", metavar="S,S,S", help="standard deviation of the pixels, likewise")
@click.option("--overwrite", is_flag=True, help="replace an earlier import")
def command(file: str, out: str, heads: int | None, mean: str | None, std: str | None, overwrite: bool) -> None:
    """Write the encoder in FILE (.pth, .safetensors) to the folder OUT, which encoder.pretrained=OUT, checkpoint=OUT
    and timm load.

    The architecture is inferred from the weights; decoder and classifier are skipped. A .pth file is opened as weights
    only: one that would execute code is refused.
    """
    from wavemim.weights.mae_import import import_vit

    folder = _target(out, overwrite=overwrite)
    try:
        found = import_vit(Path(file), folder, heads=heads, mean=_numbers("mean", mean), std=_numbers("std", std))
    except ValueError as error:
        raise SettingError(str(error)) from None
    made = found["model_args"]
    click.echo(
        f"import: {found['architecture']}, width {made['embed_dim']}, {made['depth']} blocks, {made['num_heads']} heads, "
        f"patches of {made['patch_size']} in {made['img_size']} pixels → {out}"
    )


def _target(out: str, *, overwrite: bool) -> Path:
    """The folder OUT. Raises SettingError where it is not local, or holds anything but an earlier import."""
    if not out or "://" in out:
        raise SettingError(f"OUT '{out}': has to be a folder on this machine")
    folder = Path(out).absolute()
    exists = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if exists and not (overwrite and (folder / "config.json").is_file()):
        hint = "already exists; --overwrite replaces it" if not overwrite else "was not written by import"
        raise SettingError(f"{out} {hint}")
    return folder


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        raise SettingError(f"--{option} {text}: give one number per channel, separated by commas") from None
