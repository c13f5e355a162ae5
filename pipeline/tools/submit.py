"""`wavemim submit`: run a stage as a job of a Ray cluster.

What is uploaded is the code of this very command, and the files that the settings name: so the cluster runs what was
checked here, and neither data nor anything else of the working folder leaves this machine.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from pipeline.config.places import local_place
from pipeline.config.recipe import Recipe
from pipeline.config.yaml_files import read_yaml
from pipeline.errors import SettingError
from pipeline.runtime import interrupts, machine

LIMIT = 50 * 2**20  # bytes of a job's folder: every node downloads it
_PACKAGES = ("wavemim", "pipeline", "tune_spaces")
_LOCK = "requirements.lock"
# Of an included folder: not code, but results, data, and what may hold secrets.
_EXCLUDED = (
    *(".*", "__pycache__", "venv", "node_modules", "wavemim-out", "mlruns", "mlartifacts", "*.db", "*.db-*", "*.lock"),
    *("*.parquet", "*.tar", "*.zip", "*.safetensors", "*.pt", "*.onnx", "*.npy"),
    *("*.jpg", "*.jpeg", "*.png", "*.tif", "*.tiff", "*.webp", "*.JPEG", "*.JPG"),
)


@click.command("submit", context_settings={"ignore_unknown_options": True})
@click.option("--address", metavar="URL", help="of the cluster's dashboard  [default: http://127.0.0.1:8265]")
@click.option("--detach", is_flag=True, help="return once the job is submitted; otherwise its log is shown")
@click.option("--install", is_flag=True, help="install the versions in requirements.lock on the nodes first")
@click.option("--include", multiple=True, metavar="PATH", help="further file or folder of code that the job needs")
@click.argument("stage")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[STAGE OPTIONS] [KEY=VALUE]...")
@click.pass_context
def command(
    context: click.Context,
    address: str | None,
    detach: bool,
    install: bool,
    include: tuple[str, ...],
    stage: str,
    arguments: tuple[str, ...],
) -> None:
    """Run a stage as a job of a Ray cluster, with this command's own code; the options of STAGE as without submit.

    The settings are checked here first. Paths in settings are those of the cluster. The exit code is that of the stage
    (143: the job was stopped); Ctrl-C ends only the display of the log.
    """
    from pipeline.runtime import job_client

    group: Any = context.parent.command if context.parent else None
    given, recipe = group.checked_for_submission(context.parent, stage, list(arguments))
    with tempfile.TemporaryDirectory(prefix="wavemim-submit-") as folder:
        entrypoint = prepare(Path(folder), stage, given, recipe, include)
        environment = runtime_env(Path(folder), install=install)
        client = job_client.connect(address)
        with job_client.answered(client.get_address()):
            job = client.submit_job(entrypoint=entrypoint, runtime_env=environment, metadata={"wavemim": stage})
    click.echo(f"submitted job {job}; wavemim logs, status and stop take this ID", err=True)
    if detach:
        click.echo(job)
        return
    with interrupts.during("job"):
        code = job_client.follow(client, job, lambda text: click.echo(text, nl=False))
        click.echo(job_client.outcome(job, client.get_job_info(job)), err=True)
    if code:
        raise click.exceptions.Exit(code)


def prepare(folder: Path, stage: str, given: dict[str, Any], recipe: Recipe, include: Sequence[str] = ()) -> str:
    """Fill a job's folder.

    Args:
        folder: An empty folder.
        stage: The stage.
        given: The stage's parameters as click parsed them: recipe, settings, space, quiet, dry_run.
        recipe: The settings that they mean.
        include: Further files and folders.

    Returns:
        The job's command, to be run in the folder.

    Raises:
        SettingError: Files have the same name, one does not exist, or the folder would be too large.
    """
    for package in _PACKAGES:
        shutil.copytree(machine.PACKAGES / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    if (machine.PACKAGES / _LOCK).is_file():
        shutil.copy(machine.PACKAGES / _LOCK, folder)
    command = ["python", "-m", "wavemim", stage, "--recipe", _send_recipe(folder, given["recipe"])]
    command += [option for option in ("--quiet", "--dry-run") if given.get(option[2:].replace("-", "_"))]
    command += given["settings"]
    spaces = (recipe.tune.space,) if isinstance(recipe.tune.space, str) else recipe.tune.space
    if any(_is_local_file(space) for space in spaces):
        names = [_send(folder, space) if _is_local_file(space) else space for space in spaces]
        command.append(f"tune.space={yaml.safe_dump(names, default_flow_style=True).strip()}")
    else:
        command += [argument for space in given.get("space", ()) for argument in ("--space", space)]
    if isinstance(recipe.segment.classes, str) and _is_local_file(recipe.segment.classes):
        command.append(f"segment.classes={_send(folder, recipe.segment.classes)}")
    if recipe.target.module is not None and _is_local_file(recipe.target.module):
        command.append(f"target.module={_send_module(folder, recipe.target.module)}")
    for path in include:
        _send(folder, path)
    _check_size(folder)
    return shlex.join(command)


def runtime_env(folder: Path, *, install: bool) -> dict[str, Any]:
    """The job's runtime environment.

    Args:
        folder: The job's folder.
        install: Whether to install the locked packages on the nodes; otherwise they are installed there already.

    Returns:
        What Ray's `submit_job` takes.

    Raises:
        SettingError: There is no lock.
    """
    environment: dict[str, Any] = {"working_dir": str(folder)}
    if install:
        lock = machine.PACKAGES / _LOCK
        if not lock.is_file():
            raise SettingError(f"--install: there is no {lock}; submit from a checkout of the project")
        lines = (line.partition(" #")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines())
        environment["pip"] = [line for line in lines if line and not line.startswith("#")]
    return environment


def _is_local_file(name: str) -> bool:
    return Path(local_place(name)).is_file()


def _send(folder: Path, name: str) -> str:
    """Copy a file or folder into the job's folder; returns its name there."""
    path = Path(local_place(name)).absolute()
    if not path.exists():
        raise SettingError(f"'{name}': no such file or folder")
    if (folder / path.name).exists():
        raise SettingError(f"'{name}': the job's folder has something else of the name {path.name}; rename it")
    if path.is_dir():
        shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns(*_EXCLUDED))
    else:
        shutil.copy(path, folder / path.name)
    return path.name


def _send_module(folder: Path, name: str) -> str:
    """Copy the file of a target, and name it as a module: a path would be another one in each job."""
    stem = Path(name).stem
    if not stem.isidentifier():
        raise SettingError(f"target.module={name}: rename the file, so that `import {stem}` were possible")
    _send(folder, name)
    return stem


def _send_recipe(folder: Path, recipe: str) -> str:
    """Write a recipe of the user's and those that it is based on into the job's folder; returns the recipe's name there."""
    from pipeline.config.load import names_of

    name, known, number, first = local_place(recipe), names_of("pipeline", "recipes"), 0, ""
    while name.endswith((".yaml", ".yml")) or "/" in name or (name not in known and Path(name).is_file()):
        content = read_yaml(name, "pipeline", "recipes", "recipe")
        stem = Path(first or name).name.removesuffix(".yaml").removesuffix(".yml")
        sent = f"{stem}{f'.base{number}' if number else ''}.yaml"
        base = content.get("base")
        if isinstance(base, str):
            base = local_place(base)
            if base.endswith((".yaml", ".yml")):
                base = str(Path(name).parent / base)
                content["base"] = f"{stem}.base{number + 1}.yaml"
        (folder / sent).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        first, number = first or sent, number + 1
        if not isinstance(base, str):
            break
        name = base
    return first or recipe


def _check_size(folder: Path) -> None:
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total, largest = sum(sizes.values()), max(sizes, key=sizes.__getitem__)
    if total > LIMIT:
        raise SettingError(
            f"the job's folder would have {total / 2**20:.0f} MiB, more than {LIMIT / 2**20:.0f}; the largest file is "
            f"{largest.relative_to(folder)} ({sizes[largest] / 2**20:.0f} MiB): put data where the cluster can read it"
        )
