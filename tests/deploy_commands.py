"""The commands in the comments of a file."""

import shlex
from pathlib import Path

from pipeline.config.load import load
from pipeline.config.recipe import Recipe

_PROGRAMS = ("aws", "cat", "docker", "export", "kubectl", "openssl", "pip", "ray", "mlflow")


def commands_of(file: Path) -> list[list[str]]:
    """The words of each command that the comments of a file show, with continued lines joined."""
    found: list[str] = []
    continued = False
    for line in file.read_text(encoding="utf-8").splitlines():
        comment = line.strip()
        if not comment.startswith("#"):
            continued = False
            continue
        text = comment.lstrip("#")
        if continued:
            found[-1] += " " + text.strip()
        elif text.startswith("   ") and text.split() and text.split()[0] in _PROGRAMS:
            found.append(text.strip())
        else:
            continue
        continued = found[-1].endswith("\\")
        found[-1] = found[-1].removesuffix("\\").rstrip()
    return [shlex.split(command, comments=True) for command in found]


def check_wavemim(words: list[str]) -> Recipe:
    """Check a `wavemim STAGE --recipe NAME …` for a cluster as the command itself would; returns its settings."""
    assert words[0] == "wavemim" and words[2] == "--recipe"
    recipe = load(words[3], words[4:])
    assert recipe.images is not None and recipe.images.startswith("s3://") and recipe.home is not None
    assert recipe.cluster.gpus is True  # no GPU is there when the command starts
    return recipe
