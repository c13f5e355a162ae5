"""The layout: import contracts between the subpackages, what importing one may load, and the size of files and functions."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_RAY = (
    *("config", "storage", "images", "shards", "checkpoints", "training", "evaluation", "models"),
    *("sweeps", "runtime.stage_folder", "runtime.usage"),
)
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
REASON = "# long:"  # in a function's lines, followed by the reason why it is longer


def modules_of(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {**modules_of("wavemim"), **modules_of("pipeline")}


def loaded_after(imports: list[str], suspects: tuple[str, ...], absent: tuple[str, ...] = ()) -> set[str]:
    """Those of `suspects` that a fresh interpreter has loaded after `imports`; importing an `absent` package fails."""
    code = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({absent!r}))\nfor name in {imports!r}: importlib.import_module(name)\n"
        f"print('loaded', *[name for name in {suspects!r} if sys.modules.get(name)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("loaded", 1)[1].split())


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_the_import_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pipeline/storage/stray.py", "def f():\n    from mlflow.entities import Metric"),
        ("pipeline/training/stray.py", "import ray.train"),
        ("pipeline/shards/stray.py", "from pipeline.checkpoints import find"),
        ("wavemim/stray.py", "import pyarrow"),
        ("pipeline/stray/stray.py", "import json"),
    ],
)
def test_a_stray_import_or_wing_breaks_a_contract(tmp_path: Path, module: str, line: str) -> None:
    for name in ("wavemim", "pipeline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / module
    path.parent.mkdir(exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text(line + "\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "stray" in done.stdout


def test_the_method_loads_no_ray_mlflow_or_pyarrow() -> None:
    modules = list(modules_of("wavemim"))
    assert len(modules) > 8
    unwanted = ("ray", "mlflow", "pyarrow")
    assert loaded_after(["wavemim"], (*unwanted, "torch")) == set()
    assert loaded_after(modules, (*unwanted, "pipeline")) == set()
    loaded_after(modules, (), absent=unwanted)  # and works where they are not installed


def test_shards_and_loops_load_neither_ray_nor_mlflow() -> None:
    named = tuple(f"pipeline.{wing}" for wing in WITHOUT_RAY)
    modules = [name for name in modules_of("pipeline") if name.startswith(named)]
    assert len(modules) > 40
    assert not loaded_after(modules, ("ray", "mlflow"))


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded_after(["pyarrow.parquet"], ("ray", "pyarrow")) == {"pyarrow"}
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        loaded_after(["pyarrow.parquet"], (), absent=("pyarrow",))


def test_there_is_no_utils_module() -> None:
    names = {name.rpartition(".")[2] for name in MODULES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_short(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= LONGEST_FILE, f"{len(lines)} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = lines[node.lineno - 1 : node.end_lineno]
            long = len(body) > LONGEST_FUNCTION and not any(REASON in line for line in body)
            assert not long, f"{node.name}: {len(body)} lines; shorten it, or say why it is long after '{REASON}'"
