"""What machines and other programs leave in the environment."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.config.settings import Cluster
from pipeline.errors import SettingError
from pipeline.runtime import machine, ray_session
from pipeline.tracking.tracker import store_uri

ROOT = Path(__file__).parents[2]
LONG = "/tmp/a-long-folder-of-a-slurm-job/1355700/scratch-of-this-user/tmp.t0016"


@pytest.fixture
def environment(monkeypatch):
    """The environment, restored afterwards."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ


def test_notebooks_and_other_tools_leave_nothing_that_breaks_a_command(environment):
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "RAY_TRAIN_V2_ENABLED": "0"}
    machine.prepare()
    assert environment["MPLBACKEND"] == "Agg" and environment["RAY_TRAIN_V2_ENABLED"] == "1"


def test_a_blank_address_of_mlflow_is_none(environment):
    environment["MLFLOW_TRACKING_URI"] = " "
    assert store_uri(load("small", ["out=/x"])) == "sqlite:////x/mlflow.db"


@pytest.mark.parametrize("known", ["", "example.org", "localhost,example.org"])
def test_servers_on_this_machine_are_reached_without_a_proxy(environment, known):
    environment.pop("NO_PROXY", None)
    environment["no_proxy"] = known
    machine.prepare()
    for name in ("no_proxy", "NO_PROXY"):
        hosts = environment[name].split(",")
        assert {"localhost", "127.0.0.1", "::1", *filter(None, known.split(","))} == set(hosts)
        assert len(hosts) == len(set(hosts))


@pytest.mark.parametrize("folder", [LONG, "/tmp/with spaces", "/tmp/schön", "/tmp/a'b"])
def test_a_temporary_folder_that_ray_cannot_use_is_replaced(environment, monkeypatch, folder):
    environment.pop("RAY_TMPDIR", None)
    environment["TMPDIR"] = folder
    assert machine.ray_folder() == "/tmp/ray"
    monkeypatch.setattr(machine, "_writable", lambda _: False)
    with pytest.raises(SettingError, match=r"TMPDIR=.*; set TMPDIR to another one"):
        machine.ray_folder()


@pytest.mark.parametrize("folder", ["/tmp/does-not-exist", "/proc", "/dev/null"])
def test_a_temporary_folder_that_cannot_be_written_is_replaced(environment, folder):
    """Fails where Ray ends with an error of its own; as root it would make the folder."""
    environment.pop("RAY_TMPDIR", None)
    environment["TMPDIR"] = folder
    assert machine.ray_folder() == "/tmp/ray"


def test_an_empty_or_relative_temporary_folder_is_not_taken_from_where_ray_starts(environment):
    environment |= {"TMPDIR": "", "RAY_TMPDIR": "here"}
    machine.prepare()
    assert "TMPDIR" not in environment and environment["RAY_TMPDIR"] == os.path.abspath("here")


def test_a_home_folder_that_cannot_be_written_gets_no_cache(environment):
    environment.pop("MPLCONFIGDIR", None)
    environment["HOME"] = "/proc"
    machine.prepare()
    assert environment["MPLCONFIGDIR"].startswith("/tmp")


def test_a_temporary_folder_that_fits_is_ray_s_own_choice(environment, monkeypatch):
    monkeypatch.setattr(machine, "_writable", lambda _: True)
    environment.pop("RAY_TMPDIR", None)
    environment["TMPDIR"] = "/tmp/short"
    assert machine.ray_folder() is None
    longest = machine.LONGEST_SOCKET - len(machine._RAY_SOCKET)
    environment["TMPDIR"] = "/".ljust(longest, "x")
    assert machine.ray_folder() is None
    environment["TMPDIR"] += "x"
    assert machine.ray_folder() == "/tmp/ray"


@pytest.mark.parametrize(("limits", "refused"), [((256, 256), True), ((256, 4096), False), ((256, -1), False)])
def test_few_open_files_are_refused_where_the_limit_cannot_be_raised(monkeypatch, limits, refused):
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    if refused:
        with pytest.raises(SettingError, match=r"may open 256 files.*ulimit -n 1024"):
            machine.check_open_files()
    else:
        machine.check_open_files()


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001"])
def test_an_address_of_another_kind_is_refused_before_ray_is_imported(address):
    with pytest.raises(SettingError, match="give HOST:PORT"), ray_session.ray_session(Cluster(address=address)):
        pass


def test_modules_of_the_same_name_do_not_take_the_place_of_the_project(tmp_path):
    own = tmp_path / "own"
    (own / "pipeline").mkdir(parents=True)
    for place in (
        own / "pipeline" / "__init__.py",
        *(tmp_path / f"{name}.py" for name in ("pipeline", "numpy", "click")),
    ):
        place.write_text("raise SystemExit('not the project')\n")
    done = subprocess.run(
        [sys.executable, "-m", "wavemim", "--version"],
        env={**os.environ, "PYTHONPATH": f"{own}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("wavemim, version")


def test_names_are_utf_8_whatever_the_locale_says(tmp_path):
    """Fails where a locale without UTF-8 makes other names of those in the command, or an error."""
    (tmp_path / "schön").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "wavemim", "prepare", "--dry-run", "images=schön"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 2 and done.stderr.decode().startswith("wavemim: images=")
    assert "schön' or its subfolders" in done.stderr.decode()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_a_terminal_cannot_show_is_escaped(encoding):
    code = "from pipeline.runtime import machine; machine.prepare(); print('\\u2192 \\udce9')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b" \\udce9\n")
