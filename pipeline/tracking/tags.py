"""The tags that every run has: its stage, recipe and folder, the user, and the version of the project."""

from __future__ import annotations

import getpass
import os
import subprocess
from importlib import metadata
from pathlib import Path

from pipeline.config.recipe import Recipe


def tags_of(recipe: Recipe, stage: str) -> dict[str, str]:
    """The tags of a stage's run."""
    tags = {
        "wavemim.stage": stage,
        "wavemim.recipe": recipe.name,
        "wavemim.run": recipe.name,  # the same for all stages of a run, which are shown together
        "wavemim.out": recipe.home or str(Path(recipe.out).expanduser().absolute()),
        "mlflow.source.name": f"wavemim {stage}",
        **_version_tags(),
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in containers
        tags["mlflow.user"] = str(os.getuid())
    return tags


def _version_tags() -> dict[str, str]:
    """The commit of the project's checkout, else the installed version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():  # not a repository that happens to contain the installed package
        try:
            commit = _git(root, "rev-parse", "HEAD")
            dirty = "-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
            return {"mlflow.source.git.commit": commit + dirty}
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        return {"wavemim.version": metadata.version("wavemim")}
    except metadata.PackageNotFoundError:
        return {}


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
