"""The `wavemim` command: stages, their settings, and what is said to the person who runs them."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import click
import yaml

from pipeline.config.load import DEFAULT_RECIPE, load, names_of, settings_of
from pipeline.config.recipe import STAGE_SECTIONS, Recipe
from pipeline.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER, SettingError, StageError
from pipeline.tools.commands import TOOLS
from wavemim import __version__

ABOUT = {
    "run": "Do all stages on a folder of images: prepare, pretrain, evaluate, tune, export; then a report.",
    "demo": "Write a small labelled set of images and run all stages on it.",
    "prepare": "Decode a folder of images once, into a shard set of wavelet pyramids.",
    "pretrain": "Pretrain an encoder on a shard set.",
    "evaluate": "Judge the frozen encoder, or one of timm's, beside the untrained encoder and raw pixels.",
    "finetune": "Fine-tune the encoder as a classifier, with labels, and measure it on val.",
    "segment": "Judge the encoder by segmentation: mean IoU of a linear head on its patch tokens, beside the untrained one.",
    "tune": "Sweep over the settings of a file in tune_spaces/, by an objective that they cannot move by themselves.",
    "export": "Write the encoder as a folder that timm.create_model loads.",
}


_asked_to_end: list[bool] = []  # by SIGTERM: an exception of its own would not survive libraries that catch interrupts


def main() -> None:
    """Entry point of the `wavemim` command."""
    try:
        with _sigterm():
            _group(standalone_mode=False)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), EXIT_USER)
    except SettingError as error:
        _fail(str(error), EXIT_USER)
    except (StageError, _checkpoint_error()) as error:
        _fail(str(error), EXIT_FAILED)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", EXIT_FAILED)
    except (KeyboardInterrupt, click.Abort):
        what, code = ("ended by SIGTERM", EXIT_TERMINATED) if _asked_to_end else ("interrupted", EXIT_INTERRUPTED)
        _fail(f"{what}; what is finished is kept, and the same command goes on", code)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="wavemim STAGE --help lists the settings of a stage.",
)
@click.version_option(__version__, prog_name="wavemim")
def _group() -> None:
    """Wavelet-driven masked image modelling on Ray: from a folder of images to a tracked, evaluated, exported encoder."""


def _stage_command(stage: str, body: Callable[[Recipe, bool], None], default_recipe: str = DEFAULT_RECIPE) -> None:
    @_group.command(stage, help=ABOUT[stage], short_help=ABOUT[stage], add_help_option=False)
    @click.option("--recipe", "-r", default=default_recipe, show_default=True, metavar="NAME|FILE.yaml")
    @click.option("--quiet", "-q", is_flag=True, help="no progress bars")
    @click.option("--help", "-h", "show_help", is_flag=True, help="this page, with the recipe's values")
    @click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
    def command(recipe: str, quiet: bool, show_help: bool, settings: tuple[str, ...]) -> None:
        chosen = load(recipe, settings, data_only=stage == "prepare")
        if show_help:
            click.echo(_help(stage, chosen, recipe))
            return
        body(chosen, not quiet)


def _help(stage: str, recipe: Recipe, recipe_name: str) -> str:
    """Usage, recipes and spaces, and every setting of the stage with type, value in this recipe and meaning."""
    width = min(max(shutil.get_terminal_size().columns, 80), 140)
    lines = [f"Usage: wavemim {stage} [--recipe NAME|FILE.yaml] [--quiet] [KEY=VALUE]...", "", ABOUT[stage], ""]
    lines.append(f"Recipes: {', '.join(names_of('pipeline', 'recipes'))}; or a YAML file")
    if "tune" in STAGE_SECTIONS.get(stage, ()):
        lines.append(f"Tune spaces: {', '.join(names_of('tune_spaces'))}; or a YAML file")
    lines += ["", f"Settings, with their values in recipe '{recipe_name}':", ""]
    values = recipe.model_dump()
    for key, kind, field in settings_of(STAGE_SECTIONS.get(stage, STAGE_SECTIONS["run"])):
        value: Any = values
        for part in key.split("."):
            value = value[part]
        value = list(value) if isinstance(value, tuple) else value
        shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        lines.append(f"  {key}={shown}   ({kind})")
        lines += textwrap.wrap(field.description or "", width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


@contextlib.contextmanager
def _session(recipe: Recipe) -> Iterator[Any]:
    from pipeline.runtime.ray_session import ray_session

    with ray_session(recipe.cluster) as session:
        yield session


def _shards(recipe: Recipe) -> None:
    """Find out that the shard set is missing or damaged before Ray is started."""
    from pipeline.shards.shard_set import ShardSet

    ShardSet.open(recipe.shards_at)


def _prepare(recipe: Recipe, progress: bool) -> None:
    from pipeline.images.sources import check_source

    check_source(recipe.images)
    from pipeline.stages.prepare import prepare, prepare_line

    with _session(recipe):
        click.echo(prepare_line(prepare(recipe, progress=progress)))


def _pretrain(recipe: Recipe, progress: bool) -> None:
    from pipeline.stages import pretrain

    for check in pretrain.CHECKS:
        check(recipe)
    checked = pretrain.check(recipe)
    with _session(recipe) as session:
        click.echo(pretrain.summary(recipe, pretrain.run(recipe, session, checked, progress=progress)))


def _evaluate(recipe: Recipe, progress: bool) -> None:
    from pipeline.checkpoints.find import checkpoint_of
    from pipeline.models.encoder_source import subject_of
    from pipeline.shards.shard_set import ShardSet
    from pipeline.stages.evaluate import check_protocols, evaluate, evaluate_lines

    if recipe.checkpoint is None:
        checkpoint_of(recipe)  # without one, that is what to say first
    shards = ShardSet.open(recipe.shards_at)
    subject = subject_of(recipe, shards)
    if shards.classes is not None:  # without labels those that need them are left out
        check_protocols(recipe, subject)
    with _session(recipe) as session:
        click.echo(evaluate_lines(recipe, evaluate(recipe, session, progress=progress, subject=subject)))


def _finetune(recipe: Recipe, progress: bool) -> None:
    from pipeline.stages import finetune

    checked = finetune.check(recipe)
    with _session(recipe) as session:
        click.echo(finetune.summary(recipe, finetune.run(recipe, session, checked, progress=progress)))


def _segment(recipe: Recipe, progress: bool) -> None:
    from pipeline.evaluation.segmentation import plan_segmentation

    plan = plan_segmentation(recipe)
    from pipeline.stages.segment import segment, segment_lines

    with _session(recipe) as session:
        click.echo(segment_lines(recipe, segment(recipe, plan, session, progress=progress)))


def _tune(recipe: Recipe, progress: bool) -> None:
    from pipeline.models.build import check_model
    from pipeline.stages.tune import read_space, tune, tune_lines

    check_model(recipe)
    read_space(recipe)
    _shards(recipe)
    with _session(recipe) as session:
        click.echo(tune_lines(tune(recipe, session, progress=progress)))


def _export(recipe: Recipe, progress: bool) -> None:
    from pipeline.stages.export import export, export_line

    click.echo(export_line(export(recipe)))


def _run(recipe: Recipe, progress: bool) -> None:
    from pipeline.stages.run import run

    click.echo(run(recipe, progress=progress))


def _demo(recipe: Recipe, progress: bool) -> None:
    from pathlib import Path

    from pipeline.config.load import with_overrides
    from pipeline.images.demo import write_demo_images

    if recipe.images is None:
        folder = Path(recipe.out) / "images"
        write_demo_images(folder, progress=progress)
        recipe = with_overrides(recipe, {"images": str(folder)})
    _run(recipe, progress)


def _checkpoint_error() -> type[Exception]:
    """The method's own error; its module imports torch, which commands that end earlier need not wait for."""
    module = sys.modules.get("wavemim.weights.checkpoint")
    return module.CheckpointError if module else StageError


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    def ended(*_: Any) -> None:
        _asked_to_end.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> None:
    click.echo(f"wavemim: {' '.join(message.split())}", err=True)
    sys.exit(code)


for _stage, _body in {
    "run": _run,
    "prepare": _prepare,
    "pretrain": _pretrain,
    "evaluate": _evaluate,
    "finetune": _finetune,
    "segment": _segment,
    "tune": _tune,
    "export": _export,
}.items():
    _stage_command(_stage, _body)
_stage_command("demo", _demo, default_recipe="demo")
for _tool in TOOLS:
    _group.add_command(_tool)

if __name__ == "__main__":
    main()
