"""Experiments: every published table has one, its numbers are the published ones, and its commands parse."""

import argparse
import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS, BENCHMARKS = ROOT / "experiments", ROOT / "benchmarks"
SHARED = ("harness", "comparisons")
NAMES = sorted(path.stem for path in EXPERIMENTS.glob("*.py") if path.stem not in SHARED)
INDEX = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
RESULTS = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def folders(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    evidence = importlib.import_module("evidence")
    monkeypatch.setattr(evidence, "COMPARISONS", dict(evidence.COMPARISONS))  # comparisons.py adds to it


def experiment(name):
    return importlib.import_module(name).EXPERIMENT


def sections():
    """Heading -> its text, up to the next heading of any depth."""
    parts = re.split(r"^#{2,3} (.*)\n", RESULTS, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def tables_of(text):
    """First cells of the header rows of the tables of a text."""
    return [
        row.strip("|").partition("|")[0].strip()
        for row, rule in zip(text.splitlines(), text.splitlines()[1:], strict=False)
        if row.startswith("|") and re.fullmatch(r"\|[-|: ]+\|", rule)
    ]


def calls(name, tmp_path):
    """The commands of an experiment, of the full run and of the reduced one."""
    harness = importlib.import_module("harness")
    places = {key: str(tmp_path / key) for key in experiment(name).inputs}
    for quick in (False, True):
        yield from experiment(name).commands(harness.Call(tmp_path / "out", quick, **places))


class Parsed(Exception):
    """A benchmark's parser accepted its command line."""


@pytest.fixture
def parse(monkeypatch):
    """Call a benchmark's own parser and nothing after it; an unknown option or choice is a SystemExit."""
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    def call(module, arguments):
        main = importlib.import_module(module).main
        with monkeypatch.context() as patched:
            patched.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            patched.setattr(sys, "argv", [module, *arguments])
            with pytest.raises(Parsed) as parsed:
                main()
        return parsed.value.args[0]

    return call


def test_the_parser_fixture_refuses_what_a_benchmark_does_not_know(parse):
    assert parse("progressive", ["--shards", "x"]).recipe == "wavelet"
    with pytest.raises(SystemExit):
        parse("progressive", ["--shards", "x", "--no-such-option"])


@pytest.mark.parametrize("name", NAMES)
def test_every_script_says_what_it_needs(name):
    done = subprocess.run([sys.executable, EXPERIMENTS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert f"experiments/{name}.py" in text and "RESULTS.md" in text
    assert re.search(r"minute|seconds|\d s;", text), "expected time"
    for option in experiment(name).inputs:
        assert re.search(rf"experiments/{name}\.py.*--{option} ", text), f"the docstring's command lacks --{option}"
    assert "/tmp" not in text and "/work" not in text and "/home" not in text


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses(name, tmp_path, parse):
    from pipeline.config.load import load

    commands = list(calls(name, tmp_path))
    assert commands or experiment(name).measure is not None
    for command in commands:
        assert command[0] == sys.executable
        if command[1] == "-m":
            done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stderr  # settings are checked before the help is printed
            continue
        script = Path(command[1])
        assert script.is_file() and script.parent in (BENCHMARKS, EXPERIMENTS)
        given = parse(script.stem, command[2:])
        if script.stem in ("evidence", "comparisons"):
            _variants_exist(given)
        if script.stem == "progressive":
            assert load(given.recipe).target.normalise == "dataset"  # that of the published run
        if script.stem == "faults":
            assert set(given.names) <= set(importlib.import_module("faults").FAULTS)
        assert str(getattr(given, "json", "")).startswith(str(tmp_path / "out"))


def _variants_exist(given):
    evidence, own = importlib.import_module("evidence"), importlib.import_module("comparisons")
    known = {**evidence.COMPARISONS, **own.COMPARISONS}
    assert set(given.variants or ()) <= {variant for name in given.compare or ["targets"] for variant in known[name]}


def without_script(heading):
    """Whether the index says why the numbers of a heading have no script."""
    return f"**{heading.partition(':')[0]}:**" in INDEX.partition("## Numbers that cannot be reproduced")[2]


def test_every_published_table_has_a_script_or_a_reason():
    made = {table for name in NAMES for table in experiment(name).tables}
    published = {(heading, first) for heading, text in sections().items() for first in tables_of(text)}
    assert len(published) > 10
    assert not {(heading, first) for heading, first in published - made if not without_script(heading)}
    for heading, first in made:  # and none is made up; a heading without a table is numbers in its text
        assert (heading, first) in published or (first == "" and heading in sections())


def test_tables_are_counted_one_by_one():
    """Two tables of one heading may begin alike: as many scripts name it as there are tables."""
    for heading, text in sections().items():
        for first in set(tables_of(text)):
            named = [name for name in NAMES if (heading, first) in experiment(name).tables]
            if not named and without_script(heading):
                continue
            assert len(named) == tables_of(text).count(first), (heading, first, named)


@pytest.mark.parametrize("name", NAMES)
def test_expected_numbers_are_the_published_ones(name):
    text = " ".join(sections()[heading] for heading, _ in experiment(name).tables)
    assert experiment(name).expected
    for one in experiment(name).expected:
        assert re.search(rf"(?<![\d.,]){re.escape(one.text)}(?!\d|[.,]\d)", text), f"{one.name}: {one.text}"


def test_published_numbers_of_evidence_are_in_the_kept_results():
    kept = json.loads((BENCHMARKS / "results" / "evidence-2026-11-23-cpu.json").read_text())
    expected = [one for name in ("reconstruction_targets", "wavelet_targets") for one in experiment(name).expected]
    measured = [(one, found) for one in expected if isinstance(found := one.find(kept), float)]
    assert len(measured) > 30  # the last variants of wavelet_targets are kept in another file
    for one, found in measured:
        assert found == pytest.approx(one.value, abs=0.051), one.name


def test_the_index_names_every_script():
    linked = set(re.findall(r"\]\((\w+)\.py\)", INDEX))
    assert linked == {*NAMES, *SHARED}


@pytest.mark.parametrize("file", ["README.md", "LOG.md", "../CONTRIBUTING.md", "../CHANGELOG.md"])
def test_links_of_the_documents_exist(file):
    path = EXPERIMENTS / file
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in link or (path.parent / link).exists(), link


def test_scripts_that_the_log_names_exist():
    log = (EXPERIMENTS / "LOG.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)\.py`", log))
    assert named <= set(NAMES) and len(named) > 5
    for entry in log.split("\n### ")[1:]:
        assert "- **What:**" in entry and "- **Lesson:**" in entry, entry.partition("\n")[0]


def test_comparison_of_measured_and_published():
    harness = importlib.import_module("harness")
    expected = (
        harness.Expected("a", 20.0, ("x", 0, "top1"), tolerance=1.6),
        harness.Expected("speed", 100, ("rate",)),
        harness.Expected("bound", 0.01, ("share",), at_most=True),
        harness.Expected("goal", None, ("goal",), published="not reached"),
        harness.Expected("same", True, ("same",), published="the same weights"),
        harness.Expected("bytes", 2.0, ("bytes",), tolerance=0.1, scale=2**-30, exact=True),
    )
    good = {"x": [{"top1": 21.6}], "rate": 1.0, "share": 0.01, "goal": None, "same": True, "bytes": 2 << 30}
    text, agrees = harness.table(expected, good, False)
    assert agrees and "± 1.6" in text and "depends on the machine" in text
    for key, value in {"x": [{"top1": 21.7}], "share": 0.02, "goal": 0.4, "same": False, "bytes": 3 << 30}.items():
        assert not harness.table(expected, good | {key: value}, False)[1], key
        missing = {name: found for name, found in good.items() if name != key}
        assert not harness.table(expected, missing, False)[1], key
    assert harness.table(expected, {"bytes": 2 << 30}, True)[1]  # of a reduced run, only exact numbers are checked
    assert not harness.table(expected, {"bytes": 3 << 30}, True)[1]
    known = harness.Expected("k", 0.06, ("k",), tolerance=0.005, known="a slip")
    assert harness.table((known,), {"k": 0.04}, False) == (harness.table((known,), {"k": 0.04}, False)[0], True)
    assert "a slip" in harness.table((known,), {"k": 0.04}, False)[0]


def test_a_whole_call_runs_compares_and_fails_with_its_command(tmp_path, capsys):
    harness = importlib.import_module("harness")

    def commands(call):
        code = "import json, sys; json.dump({'n': float(sys.argv[2])}, open(sys.argv[1], 'w'))"
        return [[sys.executable, "-c", code, str(call.out / "result.json"), *call.either(("4",), ("nothing",))]]

    made = harness.Experiment((), (harness.Expected("n", 4.1, ("n",), tolerance=0.2),), commands)
    out = ["--out", str(tmp_path / "out")]
    assert harness.main(made, "about", [*out, "--compare-only"]) == 2
    assert harness.main(made, "about", [*out, "--print"]) == 0
    assert not (tmp_path / "out" / "result.json").exists()
    assert harness.main(made, "about", out) == 0
    assert "agrees" in capsys.readouterr().out
    (tmp_path / "out" / "result.json").write_text('{"n": 5}')
    assert harness.main(made, "about", [*out, "--compare-only"]) == 1
    assert harness.main(made, "about", [*out, "--quick"]) == 1
    assert "the command ended with 1" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    harness = importlib.import_module("harness")
    with pytest.raises(SystemExit, match="2"):
        harness.main(experiment("growing_images"), "about", ["--shards", str(tmp_path / "none")])
    assert "no such folder" in capsys.readouterr().err


def test_counted_decoders_are_the_published_ones():
    """Three of the table's rows; the script counts all."""
    module = importlib.import_module("decoder_costs")
    counted = {
        (name, share): module.count(recipe, {**changes, "decoder.predict": float(share)})
        for name, share in (("MAE's", "1"), ("linear", "1"), ("wamim_vit_base, cross-attention", "0.25"))
        for recipe, changes in [module.DECODERS[name]]
    }
    checked = [one for one in module.EXPERIMENT.expected if one.where[:2] in counted]
    assert len(checked) == 5
    for one in checked:
        found = counted[one.where[:2]][one.where[2]]
        assert one.verdict(found, quick=False) == "agrees", (one.name, found)


def test_own_comparisons_are_recipes_that_differ():
    from pipeline.config.load import load, with_overrides

    evidence_variants = importlib.import_module("evidence_variants")
    for comparison in importlib.import_module("comparisons").COMPARISONS.values():
        variants = evidence_variants.settled(comparison, evidence_variants.TESTBEDS[64]).values()
        overrides = [(load(variant.recipe), evidence_variants.resetting(variant.overrides)) for variant in variants]
        recipes = [with_overrides(recipe, settings).dump() for recipe, settings in overrides]
        assert all(recipes.count(recipe) == 1 for recipe in recipes)


def test_pre_commit_runs_the_commands_of_make_lint():
    (target,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    linters = {line.strip().removeprefix("$(BIN)/") for line in target.splitlines()}
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    if "importlinter" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8"):
        hooks.discard("lint-imports")  # nothing to check until there are contracts
    assert hooks == linters
    for hook in repository["hooks"]:
        assert hook["entry"].startswith(".venv/bin/") and hook["language"] == "system" and not hook["pass_filenames"]


def test_make_targets_of_the_guide_are_those_it_describes():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {"install", "lint", "test", "test-faults", "demo"} <= set(re.findall(r"make ([\w-]+)", guide))


def test_scripts_import_nothing_of_ray_at_the_top():
    """`--help` and the tests above answer at once."""
    for path in EXPERIMENTS.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            alias.name.partition(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {(node.module or "").partition(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not names & {"ray", "torch", "pipeline", "wavemim"}, path.name
