"""Walls between the rooms: the method knows no Ray, and one file knows MLflow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_RAY = (
    "config",
    "storage",
    "images",
    "shards",
    "checkpoints",
    "training",
    "runtime.stage_folder",
    "runtime.usage",
)
MLFLOW_IMPORTERS = {"pipeline.tracking.mlflow_client"}
# Files that may name Ray at all, at the top or inside a function.
RAY_IMPORTERS = {
    *(
        "pipeline.stages.evaluate",
        "pipeline.stages.prepare",
        "pipeline.stages.pretrain",
        "pipeline.runtime.ray_internals",
        "pipeline.runtime.ray_session",
        "pipeline.stages.tune",
    ),
    *(
        "pipeline.workers.worker",
        "pipeline.workers.group",
        "pipeline.stages.segment",
        "pipeline.stages.finetune",
        "pipeline.tools.embed",
    ),
}


def modules_of(package: str, root: Path = ROOT) -> dict[str, Path]:
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it, inside functions too."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            named.add(node.module.partition(".")[0])
    return named


def importers(package: str, root: Path = ROOT) -> set[str]:
    everything = {**modules_of("wavemim", root), **modules_of("pipeline", root)}
    return {name for name, path in everything.items() if package in imports_of(path)}


def loaded_after(imports: list[str], suspects: tuple[str, ...], absent: tuple[str, ...] = ()) -> set[str]:
    """Those of `suspects` that a fresh interpreter has loaded after `imports`; importing an `absent` package fails."""
    code = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({absent!r}))\nfor name in {imports!r}: importlib.import_module(name)\n"
        f"print('loaded', *[name for name in {suspects!r} if sys.modules.get(name)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("loaded", 1)[1].split())


def test_the_method_loads_no_ray_mlflow_or_pyarrow() -> None:
    modules = list(modules_of("wavemim"))
    assert len(modules) > 8
    unwanted = ("ray", "mlflow", "pyarrow")
    assert loaded_after(["wavemim"], unwanted) == set()
    assert loaded_after(modules, (*unwanted, "pipeline")) == set()
    loaded_after(modules, (), absent=unwanted)  # and works where they are not installed
    assert not {name for package in unwanted for name in importers(package) if name.startswith("wavemim")}


def test_shards_and_the_loop_load_neither_ray_nor_mlflow() -> None:
    named = tuple(f"pipeline.{wing}" for wing in WITHOUT_RAY)
    modules = [name for name in modules_of("pipeline") if name.startswith(named)]
    assert len(modules) > 40
    assert not loaded_after(modules, ("ray", "mlflow"))


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded_after(["pyarrow.parquet"], ("ray", "pyarrow")) == {"pyarrow"}
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        loaded_after(["pyarrow.parquet"], (), absent=("pyarrow",))


def test_mlflow_and_ray_are_imported_where_they_belong() -> None:
    assert importers("mlflow") == MLFLOW_IMPORTERS
    assert importers("ray") <= RAY_IMPORTERS
    assert "pipeline.runtime.ray_session" in importers("ray")


@pytest.mark.parametrize("line", ["import mlflow", "def f():\n    from mlflow.entities import Metric"])
def test_a_stray_import_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "wavemim").mkdir()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "stray.py").write_text(line + "\n")
    assert importers("mlflow", tmp_path) == {"pipeline.stray"}


def test_there_is_no_utils_module() -> None:
    names = {name.rpartition(".")[2] for package in ("wavemim", "pipeline") for name in modules_of(package)}
    assert not names & {"utils", "util", "helpers", "common", "misc"}
