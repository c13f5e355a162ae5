"""The `wavemim` command: tables of stages and tools, their help, and how errors become one line and an exit code.

The modules of stages and tools are imported when their command runs, so that help and mistakes in settings are quick.
"""

from __future__ import annotations

import sys

from pipeline.runtime import interrupts

if __name__ == "__main__":  # the command: also while it is imported
    interrupts.install()

import copy
import difflib
import importlib
import json
import os
import re
import shutil
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from pipeline.config.places import check_length, check_text, local_place, printable
from pipeline.errors import EXIT_FAILED, EXIT_USER, SettingError, StageError
from pipeline.runtime import machine
from wavemim import __version__

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe


class Entry(NamedTuple):
    """A command: the module it lives in (MODULE, or MODULE:NAME where it is not named `command`), and its description."""

    module: str
    about: str


SEQUENCES = {
    "run": Entry(
        "pipeline.stages.run",
        "Run all stages on a folder of images (prepare, pretrain, evaluate, tune, export) and write a report.",
    ),
    "demo": Entry("pipeline.stages.run", "Generate a small labelled set of images and run all stages on it."),
}
STAGES = {
    "prepare": Entry("pipeline.stages.prepare", "Decode images once, into a shard set of wavelet pyramids."),
    "pretrain": Entry("pipeline.stages.pretrain", "Pretrain an encoder on a shard set."),
    "evaluate": Entry(
        "pipeline.stages.evaluate",
        "Evaluate the frozen encoder, or one of timm's, compared with the untrained encoder and raw pixels.",
    ),
    "finetune": Entry(
        "pipeline.stages.finetune", "Fine-tune the encoder as a classifier on labelled images and test it on val."
    ),
    "segment": Entry(
        "pipeline.stages.segment",
        "Evaluate the encoder on segmentation: mean IoU of a linear head on its frozen patch tokens.",
    ),
    "tune": Entry(
        "pipeline.stages.tune",
        "Sweep over the settings of a file in tune_spaces/, by an objective that does not depend on the loss.",
    ),
    "export": Entry("pipeline.stages.export", "Export the encoder as a folder that timm.create_model loads."),
}
TOOLS = {
    "verify": Entry("pipeline.tools.verify", "Compare every file of a shard set with its checksum."),
    "inspect": Entry("pipeline.tools.inspect_shards", "Describe the contents of a shard set, and draw them."),
    "merge": Entry("pipeline.tools.merge", "Make one shard set of several, without copying them."),
    "show": Entry("pipeline.tools.show", "Draw a trained model's predictions for your own images."),
    "replay": Entry("pipeline.tools.replay", "Analyse the steps of a run that ended with non-finite gradients."),
    "sync": Entry("pipeline.tools.sync", "Send MLflow what it missed while it was unreachable."),
    "compare": Entry("pipeline.tools.compare", "Compare runs: settings that differ, metrics, cost; with a plot."),
    "embed": Entry("pipeline.tools.embed", "Write features of images to a Parquet file."),
    "import": Entry("pipeline.tools.import_weights", "Convert published ViT weights (MAE, DeiT) to a timm folder."),
    "submit": Entry("pipeline.tools.submit", "Run a stage as a job of a Ray cluster, and show its log."),
    "status": Entry("pipeline.tools.status", "Show running stages of a Ray cluster with progress, rate and time left."),
    "logs": Entry("pipeline.tools.jobs:logs", "Show the log of a job of a Ray cluster."),
    "stop": Entry("pipeline.tools.jobs:stop", "Stop a job of a Ray cluster; training saves a checkpoint first."),
}
_WITH_SETTINGS = ("compare", "sync", "submit")  # tools that take settings, and say themselves which

_SPACE = {"--space NAME|FILE.yaml": "the search space, the setting tune.space; repeated, spaces are joined"}
OPTIONS = {  # of single stages, with their descriptions
    "run": _SPACE,
    "demo": _SPACE,
    "prepare": {"--dry-run": "say what was found in images=, without decoding or writing anything"},
    "tune": {**_SPACE, "--dry-run": "check the sweep, print its first points, budget and expected time; start nothing"},
}

_DRY_RUNS = {"prepare": "pipeline.stages.prepare", "tune": "pipeline.stages.tune_plan"}


def main() -> None:
    """Entry point of the `wavemim` command."""
    machine.prepare()
    try:
        with interrupts.raised():
            try:
                if code := _group(standalone_mode=False):  # that of click.exceptions.Exit
                    sys.exit(code)
            except click.Abort:  # what click makes of KeyboardInterrupt
                raise KeyboardInterrupt from None
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:  # its message is the help
        click.echo(error.format_message(), err=True)
        sys.exit(EXIT_USER)
    except click.NoSuchOption as error:
        stage = error.ctx is not None and error.ctx.info_name in SEQUENCES | STAGES
        hint = " Settings are given as KEY=VALUE, such as images=FOLDER." if stage else ""
        _fail(error.format_message() + hint, EXIT_USER)
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


class _Commands(click.Group):
    """The commands in the tables, each imported when it is used."""

    def list_commands(self, ctx: click.Context | None) -> list[str]:
        """Names of all commands."""
        return [*SEQUENCES, *STAGES, *TOOLS]

    def get_command(self, ctx: click.Context | None, cmd_name: str) -> click.Command | None:
        """The command of this name, or None."""
        if cmd_name in TOOLS:
            module, _, name = TOOLS[cmd_name].module.partition(":")
            with machine.importing():
                tool: click.Command = copy.copy(getattr(importlib.import_module(module), name or "command"))
            if tool.callback is not None:
                tool.callback = interrupts.during(cmd_name)(tool.callback)
            return tool
        return _stage_command(cmd_name) if cmd_name in (SEQUENCES | STAGES) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click has it, with one line for a name that is misspelt and for settings given to a tool."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean '{near[0]}'?" if near else f"; commands are {', '.join(known)}"
            raise SettingError(f"no command '{name}'{meant}")
        if name in TOOLS and name not in _WITH_SETTINGS:
            for argument in args[1:]:
                if re.match(r"[a-z_.]+=", argument) and not os.path.exists(argument):
                    raise SettingError(
                        f"'{argument}': {name} takes paths and --options, not settings; wavemim {name} --help lists them"
                    )
        if name in TOOLS and name != "submit":
            args = [name, *(_place(name, argument) for argument in args[1:])]
        return super().resolve_command(ctx, args)

    def checked_for_submission(
        self, ctx: click.Context | None, stage: str, arguments: list[str]
    ) -> tuple[dict[str, Any], Recipe]:
        """The parameters and the settings of a stage that is to run elsewhere, after all checks that need no data.

        Args:
            ctx: The context of this group.
            stage: The stage.
            arguments: Its arguments.

        Returns:
            The parameters as click parsed them, and the settings.

        Raises:
            SettingError: The settings cannot be used.
        """
        if stage not in SEQUENCES | STAGES:
            raise SettingError(f"submit {stage}: not a stage; stages are {', '.join(SEQUENCES | STAGES)}")
        command = _stage_command(stage)
        parameters = command.make_context(stage, arguments, parent=ctx).params
        recipes: list[Recipe] = []
        command.callback(**parameters, then=recipes.append)  # type: ignore[misc]
        _check(stage, recipes[0])
        return parameters, recipes[0]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        for title, entries in (("Stages", SEQUENCES | STAGES), ("Tools", TOOLS)):
            with formatter.section(title):
                formatter.write_dl([(name, entry.about) for name, entry in entries.items()])


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="wavemim STAGE --help lists the settings of a stage, wavemim TOOL --help the arguments of a tool.",
)
@click.version_option(__version__, prog_name="wavemim")
def _group() -> None:
    """Wavelet-driven masked image modelling on Ray: from a folder of images to a tracked, evaluated, exported encoder."""


def _place(tool: str, argument: str) -> str:
    """An argument of a tool, which may be a place, with ``file://`` decoded. Raises SettingError."""
    option, equals, place = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    place = local_place(place)
    if not (tool in ("embed", "show") and os.path.isfile(place)):  # images may have any name
        check_text(argument, place)
    check_length(argument, place)
    return f"{option}{equals}{place}"


def _stage_command(stage: str) -> click.Command:
    """The command of a stage, or of a sequence of stages."""
    from pipeline.config.load import DEFAULT_RECIPE, load

    about, default = (SEQUENCES | STAGES)[stage].about, "demo" if stage == "demo" else DEFAULT_RECIPE

    @click.command(stage, help=about, short_help=about, add_help_option=False)
    @click.option("--recipe", "-r", default=default, show_default=True, metavar="NAME|FILE.yaml")
    @click.option("--quiet", "-q", is_flag=True, help="no progress bars")
    @click.option("--help", "-h", "show_help", is_flag=True, help="this page, with the recipe's values")
    @click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
    def command(
        recipe: str,
        quiet: bool,
        show_help: bool,
        settings: tuple[str, ...],
        space: tuple[str, ...] = (),
        dry_run: bool = False,
        then: Callable[[Recipe], object] | None = None,
    ) -> None:
        chosen = load(recipe, _with_spaces(settings, space), data_only=stage == "prepare")
        if then is not None:
            then(chosen)
        elif show_help:
            click.echo(_help(stage, chosen, recipe))
        elif dry_run:
            importlib.import_module(_DRY_RUNS[stage]).dry_run(chosen, click.echo)
        else:
            _run(stage, chosen, progress=not quiet)

    if "--space NAME|FILE.yaml" in OPTIONS.get(stage, {}):
        click.option("--space", multiple=True, metavar="NAME|FILE.yaml")(command)
    if stage in _DRY_RUNS:
        click.option("--dry-run", is_flag=True)(command)
    return command


def _with_spaces(settings: tuple[str, ...], spaces: tuple[str, ...]) -> tuple[str, ...]:
    """The settings of a call, with its --space options as what they stand for, tune.space=[...]."""
    if not spaces:
        return settings
    for setting in settings:
        if setting.partition("=")[0].strip() == "tune.space":
            raise SettingError(f"{setting}: --space is the same setting; use one of them, --space once for each file")
    return (*settings, f"tune.space={json.dumps(spaces)}")


def _check(stage: str, recipe: Recipe) -> None:
    """Check the settings of a stage for a cluster, whose files this machine does not see. Raises SettingError."""
    from pipeline.runtime.ray_job import check_absolute
    from pipeline.stages.sequence import check_settings

    check_absolute(recipe)
    if recipe.cluster.address is not None:
        raise SettingError("cluster.address: a job runs on the cluster that it is submitted to; leave it out")
    given = recipe.encoder.pretrained
    if isinstance(given, str) and not os.path.exists(given):  # a place on the cluster
        recipe = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"pretrained": False})})
    if stage == "demo" and recipe.images is None:  # it generates them
        recipe = recipe.model_copy(update={"images": os.path.join(recipe.out, "images")})
    if stage in SEQUENCES:
        stages: Any = importlib.import_module("pipeline.stages.run").STAGES.values()
    else:
        stages = [importlib.import_module(STAGES[stage].module)]
    check_settings(stages, recipe, elsewhere=True)


def _run(stage: str, recipe: Recipe, *, progress: bool) -> None:
    from pipeline.runtime.ray_job import check_places

    check_places(recipe)
    if stage in SEQUENCES:
        with machine.importing():
            from pipeline.stages.run import demo, run

        (demo if stage == "demo" else run)(recipe, progress=progress, say=click.echo)
        return
    with machine.importing():
        module: Any = importlib.import_module(STAGES[stage].module)
        from pipeline.stages.sequence import run_stages

    run_stages({stage: module}, recipe, progress=progress, say=click.echo)


def _help(stage: str, recipe: Recipe, recipe_name: str) -> str:
    """Usage, recipes and spaces, and every setting of the stage with type, value in this recipe and meaning."""
    import yaml

    from pipeline.config.load import names_of, settings_of

    width = min(max(shutil.get_terminal_size().columns, 80), 140)
    options = "".join(f" [{option}]" for option in OPTIONS.get(stage, {}))
    lines = [f"Usage: wavemim {stage} [--recipe NAME|FILE.yaml] [--quiet]{options} [KEY=VALUE]...", ""]
    lines += [(SEQUENCES | STAGES)[stage].about, ""]
    lines.append(f"Recipes: {', '.join(names_of('pipeline', 'recipes'))}; or a YAML file")
    shown_for = "run" if stage == "demo" else stage
    if shown_for in ("tune", "run"):
        lines.append(f"Tune spaces: {', '.join(names_of('tune_spaces'))}; or a YAML file")
    lines += [f"{option}: {about}" for option, about in OPTIONS.get(stage, {}).items()]
    lines += ["", f"Settings, with their values in recipe '{recipe_name}':", ""]
    values = recipe.model_dump()
    for key, kind, field in settings_of(shown_for):
        value: Any = values
        for part in key.split("."):
            value = value[part]
        value = list(value) if isinstance(value, tuple) else value
        shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        lines.append(f"  {key}={shown}   ({kind})")
        lines += textwrap.wrap(field.description or "", width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _checkpoint_error() -> type[Exception]:
    """The method's own error, whose module imports torch: it cannot have been raised where that is not loaded."""
    module = sys.modules.get("wavemim.weights.checkpoint")
    return module.CheckpointError if module else StageError


def _fail(message: str, code: int) -> None:
    click.echo(f"wavemim: {printable(' '.join(message.split()))}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
