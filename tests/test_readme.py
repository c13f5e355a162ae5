"""The README's commands are commands: each is parsed by the real command line, its files exist, its YAML is a recipe."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.config.load import load, names_of

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands():
    for language, block in BLOCKS:
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                if "wavemim " in (line := line.partition("#")[0].strip()):
                    yield line[line.index("wavemim ") :]


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_every_wavemim_command_is_valid(line):
    from pipeline.cli import _group

    _, stage, *rest = shlex.split(line)
    command = _group.get_command(None, stage)
    assert command is not None, stage
    context = command.make_context(stage, rest)
    if "recipe" in context.params:
        load(context.params["recipe"], context.params["settings"])


def test_there_are_commands_for_every_stage():
    assert {line.split()[1] for line in commands()} >= {
        "run",
        "prepare",
        "pretrain",
        "evaluate",
        "tune",
        "export",
        "verify",
        "inspect",
        "show",
    }


def test_the_yaml_is_a_recipe(tmp_path):
    (block,) = [block for language, block in BLOCKS if language == "yaml"]
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    assert load(str(path)).train.epochs == 40


def test_every_file_it_names_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    tree = next(block for language, block in BLOCKS if "the method: torch" in block)
    for folder in ("wavemim", "pipeline"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name != "__init__.py":
                assert path.name in tree, path.name


def test_every_make_target_it_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for recipe in names_of("pipeline", "recipes"):
        assert f"`{recipe}`" in TEXT
