"""The wheel is whole: what works from a checkout works once installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_packages_recipes_spaces_and_the_command_are_in(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for package in ("wavemim", "pipeline", "tune_spaces")
        for pattern in ("*.py", "*.yaml", "*.md")
        for path in (ROOT / package).rglob(pattern)
    }
    assert {"pipeline/recipes/small.yaml", "tune_spaces/level_weights.yaml", "pipeline/cli.py"} <= expected
    assert expected <= names
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/"))}
    (entry_points,) = (name for name in names if name.endswith("dist-info/entry_points.txt"))
    assert "wavemim = wavemim.__main__:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_command_works_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    unpacked, elsewhere = tmp_path / "unpacked", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(unpacked)
    elsewhere.mkdir()
    code = "import pipeline.cli, sys; print(pipeline.cli.__file__); sys.argv[0] = 'wavemim'; pipeline.cli.main()"
    for arguments, expected in (
        (["--help"], "prepare"),
        (["tune", "--help"], "Tune spaces: decoder, level_weights"),  # reads the recipes and spaces that came with it
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "PYTHONPATH": str(unpacked)},
            cwd=elsewhere,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(unpacked)), "not the wheel's code"
        assert expected in done.stdout
