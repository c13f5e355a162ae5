"""README and docs: commands are parsed by the real command line, recipes load, links lead somewhere, messages are real."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load, names_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *DOCS]
INCLUDED = {"FORMAT.md", "RESULTS.md"}  # by pymdownx.snippets; they have tests of their own
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def text_of(path):
    return path.read_text(encoding="utf-8")


def blocks(language):
    """Every block of code in that language, with its page."""
    for page in PAGES:
        for name, block in BLOCK.findall(text_of(page)):
            if name == language:
                yield pytest.param(block, id=f"{page.name}: {block.strip().splitlines()[-1][:60]}")


def commands():
    """Every `wavemim …` in shell blocks, without comments and what stands before it."""
    for page in PAGES:
        for name, block in BLOCK.findall(text_of(page)):
            if name == "sh":
                for line in block.replace("\\\n", " ").splitlines():
                    words = shlex.split(line, comments=True)
                    if "wavemim" in words:
                        yield tuple(words[words.index("wavemim") + 1 :])


@pytest.fixture
def files_in_docs(tmp_path, monkeypatch):
    """The files of a user's own that commands name."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "wavemim-out/runs/small/tune/best.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("base: small\n")
    shutil.copytree(ROOT / "examples", "examples")


@pytest.mark.parametrize("words", sorted(set(commands())), ids=" ".join)
def test_every_wavemim_command_is_valid(words, files_in_docs):
    from pipeline.cli import _group

    stage, *rest = words
    command = _group.get_command(None, stage)
    assert command is not None, stage
    context = command.make_context(stage, rest)
    if stage == "submit":  # the options and settings of another command
        stage, rest = context.params["stage"], list(context.params["arguments"])
        context = _group.get_command(None, stage).make_context(stage, rest)
    if "recipe" in context.params:
        load(context.params["recipe"], context.params["settings"], data_only=stage == "prepare")


def test_every_command_is_shown_somewhere():
    from pipeline.cli import _group

    assert {words[0] for words in commands()} >= set(_group.list_commands(None)) - {"demo"}  # that one is `make demo`


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_yaml_block_is_a_recipe_or_a_search_space(block, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    if "space" in yaml.safe_load(block):
        from pipeline.stages.tune import check_space

        check_space(load("small", [f"tune.space={path}"]))
    else:
        assert load(str(path)).name == "mine"


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_compiles(block):
    ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    text = BLOCK.sub("", text_of(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        if anchor:
            assert anchor in {slug(heading) for heading in HEADING.findall(text_of(target))}, f"{page.name}: {link}"


def slug(heading):
    """The anchor of a heading, as MkDocs makes it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_every_page_is_in_the_navigation_and_includes_a_file_that_exists():
    config = text_of(ROOT / "mkdocs.yml")
    for page in DOCS:
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in config, page.name
    included = {name for page in DOCS for name in re.findall(r'^--8<-- "(.+)"', text_of(page), re.MULTILINE)}
    assert included == INCLUDED
    places = yaml.safe_load(re.search(r"base_path: (\[.*\])", config)[1])
    for name in included:
        assert any((ROOT / place / name).is_file() for place in places), name


def test_the_readme_is_short_and_names_every_wing():
    text = text_of(README)
    assert len(text.splitlines()) <= 150
    tree = next(block for _, block in BLOCK.findall(text) if "the method: torch" in block)
    assert len(tree.splitlines()) <= 15
    for package in ("wavemim", "pipeline"):
        for wing in (path.name for path in (ROOT / package).iterdir() if any(path.glob("*.py"))):
            assert f"{wing}/" in tree, f"{package}/{wing}"
            assert f"`{wing}/`" in text_of(ROOT / "docs" / "architecture.md"), f"{package}/{wing}"


def test_every_make_target_and_file_that_is_named_exists():
    makefile = text_of(ROOT / "Makefile")
    for page in PAGES:
        for target in re.findall(r"(?:`|^)make ([\w-]+)", text_of(page), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
        for name in re.findall(r"\b((?:benchmarks|tune_spaces|tests|examples)/[\w/]+\.\w+)", text_of(page)):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_every_recipe_is_described():
    for recipe in names_of("pipeline", "recipes"):
        assert f"`{recipe}`" in text_of(ROOT / "docs" / "recipes.md"), recipe


def test_every_setting_that_is_named_exists():
    from pipeline.config.load import settings_of
    from pipeline.config.recipe import Recipe

    known = {key for key, _, _ in settings_of()}
    sections = "|".join({key.partition(".")[0] for key in known if "." in key})
    mappings = {key for key in known if isinstance(field_of(Recipe, key), dict)}
    for page in PAGES:
        for name in re.findall(rf"`((?:{sections})\.(?!(?:yaml|parquet|tar)\b)[a-z_]+)(?![a-z_(])", text_of(page)):
            assert name in known or name.rpartition(".")[0] in mappings, f"{page.name}: {name}"


def field_of(recipe, key):
    """The default of a setting by its dotted key."""
    value = recipe(name="defaults").model_dump()
    for part in key.split("."):
        value = value[part]
    return value


def test_the_settings_page_is_current(tmp_path):
    check = [sys.executable, str(ROOT / "docs" / "generate_settings.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr


def test_a_settings_page_that_is_not_current_is_noticed(tmp_path):
    script = tmp_path / "generate_settings.py"
    script.write_text(text_of(ROOT / "docs" / "generate_settings.py"))
    (tmp_path / "settings.md").write_text(text_of(ROOT / "docs" / "settings.md").replace("train.batch", "train.size"))
    check = [sys.executable, str(script), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 1
    assert "not current" in done.stderr


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def messages():
    """The messages of the troubleshooting page: first cells of its tables."""
    page = text_of(ROOT / "docs" / "troubleshooting.md")
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def templates():
    """Every text in the code, values in f-strings as NUL."""
    for package in ("pipeline", "wavemim"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(text_of(path))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_messages_of_the_troubleshooting_page_are_messages_of_the_code():
    known = set(templates())
    assert len(messages()) >= 25
    for message in messages():
        parts = [part for part in message.split("…") if len(part.split()) >= 3]
        assert parts, f"{message}: too few words to be found"
        found = any(all(part in text for part in parts) for text in known)
        assert found, f"docs/troubleshooting.md: no such message (any more): {message}"
