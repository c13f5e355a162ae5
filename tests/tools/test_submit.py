"""`wavemim submit` up to the request to the cluster: what is checked here, what is uploaded, what is asked of Ray."""

import os
import shlex
from types import SimpleNamespace

import click
import pytest
import yaml
from stage_calls import wavemim

from pipeline import cli
from pipeline.config.load import load
from pipeline.errors import EXIT_FAILED, SettingError, StageError
from pipeline.runtime import job_client, ray_internals, ray_job
from pipeline.tools import submit
from pipeline.tools.arguments import Output

ON_CLUSTER = ("images=/mnt/photos", "out=/mnt/out")


class Client:
    """Ray's client as far as it is used, with the log in pieces, a cut connection, and a job that ends in between."""

    def __init__(self, status="SUCCEEDED", code=0, message="", cuts=0):
        self.info = SimpleNamespace(status=status, driver_exit_code=code, message=message)
        self.info.status = type("Status", (str,), {"is_terminal": lambda _: self.tails > cuts})(status)
        self.cuts, self.tails, self.asked = cuts, 0, []

    def get_address(self):
        return "http://cluster:8265"

    def submit_job(self, **asked):
        folder = asked["runtime_env"]["working_dir"]
        files = {os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names}
        self.asked.append({**asked, "files": files})
        return "raysubmit_1"

    def get_job_info(self, job):
        return self.info

    async def tail_job_logs(self, job):
        self.tails += 1
        for text in ("one\n", "two\n", "three\n"):
            yield text
            if self.tails <= self.cuts and text == "two\n":
                raise RuntimeError("WebSocket connection closed unexpectedly")


@pytest.fixture
def client(monkeypatch):
    made = Client()
    monkeypatch.setattr(job_client, "connect", lambda address: made)
    return made


def unpacked(command):
    return shlex.split(command)


def test_what_is_uploaded_is_this_code_and_nothing_else_of_the_working_folder(monkeypatch, capsys, client, tmp_path):
    (tmp_path / "secret.env").write_text("PASSWORD=1")
    monkeypatch.chdir(tmp_path)
    code, out, _ = wavemim(monkeypatch, capsys, "submit", "--detach", "prepare", "-r", "small", "--quiet", *ON_CLUSTER)
    assert (code, out) == (0, "raysubmit_1\n")
    [asked] = client.asked
    assert unpacked(asked["entrypoint"]) == [
        "python",
        "-m",
        "wavemim",
        "prepare",
        "--recipe",
        "small",
        "--quiet",
        *ON_CLUSTER,
    ]
    assert {name.partition("/")[0] for name in asked["files"]} <= {*submit._PACKAGES, "requirements.lock"}
    assert {"wavemim/__main__.py", "pipeline/recipes/small.yaml", "tune_spaces/mask_ratio.yaml"} <= asked["files"]
    assert not any("__pycache__" in name for name in asked["files"])
    assert "pip" not in asked["runtime_env"]


def test_files_that_settings_name_are_sent_and_named_as_in_the_job(monkeypatch, tmp_path):
    (tmp_path / "bases").mkdir()
    (tmp_path / "mine.yaml").write_text("base: bases/mid.yaml\ntarget: {module: own_target.py}\nmask: {ratio: 1e-1}\n")
    (tmp_path / "bases" / "mid.yaml").write_text("base: top.yaml\ntrain: {epochs: 7}\n")
    (tmp_path / "bases" / "top.yaml").write_text("base: small\nseed: 3\n")
    (tmp_path / "own_target.py").write_text("")
    (tmp_path / "ratios.yaml").write_text("mask.ratio: {values: [0.5]}\n")
    (tmp_path / "names.txt").write_text("grass\nsky\n")
    monkeypatch.chdir(tmp_path)
    settings = (*ON_CLUSTER, "segment.classes=names.txt")
    recipe = load("mine.yaml", [*settings, "tune.space=[ratios.yaml, level_weights]"])
    given = {"recipe": "mine.yaml", "settings": settings, "space": ("ratios.yaml", "level_weights")}
    folder = tmp_path / "job"
    folder.mkdir()
    command = unpacked(submit.prepare(folder, "tune", given, recipe))
    sent = [argument.partition("=")[2] for argument in command[-3:]]
    assert [yaml.safe_load(text) for text in sent] == [["ratios.yaml", "level_weights"], "names.txt", "own_target"]
    monkeypatch.chdir(folder)  # as the job, with what Ray does to its search path
    monkeypatch.syspath_prepend(folder)
    there = load(command[command.index("--recipe") + 1], command[command.index("--recipe") + 2 :])
    for key in ("name", "seed", "mask", "train", "images", "out"):
        assert getattr(there, key) == getattr(recipe, key), key
    assert (there.seed, there.train.epochs, there.mask.ratio, there.name) == (3, 7, 0.1, "mine")
    assert there.given >= recipe.given


def test_a_single_space_of_ones_own_is_sent_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ratios.yaml").write_text("mask.ratio: {values: [0.5]}\n")
    settings = (*ON_CLUSTER, "tune.space=ratios.yaml")
    folder = tmp_path / "job"
    folder.mkdir()
    command = unpacked(
        submit.prepare(folder, "tune", {"recipe": "small", "settings": settings}, load("small", settings))
    )
    assert yaml.safe_load(command[-1].partition("=")[2]) == ["ratios.yaml"] and (folder / "ratios.yaml").is_file()


MISTAKES = [
    (["prepare", "images=/mnt/photos"], "out=wavemim-out: in a Ray job"),
    (["prepare", "images=photos", "out=/mnt/out"], "images=photos: in a Ray job"),
    (["pretrain", "out=/mnt/out", "shards=shards"], "shards=shards: in a Ray job"),
    (["pretrain", "out=/mnt/out", "train.checkpoints_at=copies"], "train.checkpoints_at=copies: in a Ray job"),
    (["pretrain", "out=/mnt/out", "tracking.uri=sqlite:///runs.db"], "tracking.uri=runs.db: in a Ray job"),
    (["prepare", "out=/mnt/out"], "images is not set"),
    (["prepare", *ON_CLUSTER, "train.epoch=3"], "did you mean 'train.epochs'?"),
    (["prepare", *ON_CLUSTER, "data.steps=[1e-9]"], "use coarser ones"),
    (["pretrain", "out=/mnt/out", "-r", "nowhere.yaml"], "no such file"),
    (["pretrain", "out=/mnt/out", "cluster.address=10.0.0.1:6379"], "leave it out"),
    (["pretain", "out=/mnt/out"], "not a stage"),
    (["prepare", *ON_CLUSTER, "--include", "nowhere.py"], "'nowhere.py': no such file or folder"),
    (["prepare", *ON_CLUSTER, "--address", "127.0.0.1:8265"], "give the dashboard's address"),
    (["prepare", *ON_CLUSTER, "--address", "http://127.0.0.1:1"], "no Ray dashboard answers there"),
    (["prepare", *ON_CLUSTER, "--address", "http://127.0.0.1:port"], "give http://HOST:PORT"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_refused_before_anything_is_submitted(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = wavemim(monkeypatch, capsys, "submit", *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_job_folder_that_is_too_large_names_the_largest_file(monkeypatch, tmp_path):
    monkeypatch.setattr(submit, "LIMIT", 4 * 2**20)
    code = tmp_path / "mylib"
    (code / "wavemim-out").mkdir(parents=True)
    (code / "wavemim-out" / "x.bin").write_bytes(bytes(9 * 2**20))  # left out, as are these
    (code / ".env").write_text("PASSWORD=1")
    (code / "photo.jpg").write_bytes(bytes(9 * 2**20))
    (code / "model.py").write_text("x = 1")
    given, recipe = {"recipe": "small", "settings": ON_CLUSTER}, load("small", ON_CLUSTER)
    (tmp_path / "job").mkdir()
    submit.prepare(tmp_path / "job", "pretrain", given, recipe, [str(code)])
    assert [path.name for path in (tmp_path / "job" / "mylib").rglob("*")] == ["model.py"]
    (code / "table.bin").write_bytes(bytes(5 * 2**20))
    (tmp_path / "again").mkdir()
    with pytest.raises(SettingError, match=r"more than 4; the largest file is mylib/table.bin \(5 MiB\)"):
        submit.prepare(tmp_path / "again", "pretrain", given, recipe, [str(code)])


def test_install_pins_what_the_lock_says(monkeypatch, tmp_path):
    (tmp_path / "requirements.lock").write_text(
        "# made by a tool\ntorch==2.11.0  # why\nray==2.60.0 ; python_version > '3'\n\n"
    )
    monkeypatch.setattr(submit.machine, "PACKAGES", tmp_path)
    assert submit.runtime_env(tmp_path, install=True)["pip"] == ["torch==2.11.0", "ray==2.60.0 ; python_version > '3'"]
    (tmp_path / "requirements.lock").unlink()
    with pytest.raises(SettingError, match="--install: there is no"):
        submit.runtime_env(tmp_path, install=True)


@pytest.mark.parametrize(
    ("status", "code", "expected", "says"),
    [
        ("SUCCEEDED", 0, 0, "job j succeeded"),
        ("FAILED", 2, 2, "job j failed with exit code 2"),
        ("FAILED", 130, 130, "job j failed with exit code 130"),
        ("STOPPED", None, 143, "job j was stopped"),
        ("FAILED", None, EXIT_FAILED, "job j could not be started: runtime_env setup failed: no pip"),
    ],
)
def test_the_exit_code_is_that_of_the_stage(status, code, expected, says):
    client = Client(status, code, "runtime_env setup failed: no pip\nTraceback")
    assert job_client.follow(client, "j", lambda _: None) == expected
    assert job_client.outcome("j", client.info) == says


def test_a_log_whose_connection_is_cut_is_shown_once(monkeypatch):
    monkeypatch.setattr(job_client, "_PAUSE", 0)
    shown = []
    client = Client(cuts=2)
    assert job_client.follow(client, "j", shown.append) == 0
    assert "".join(shown) == "one\ntwo\nthree\n" and client.tails == 3


def test_a_reader_of_the_log_that_is_gone_ends_the_command():
    def closed(text):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        job_client.follow(Client(), "j", closed)


def test_a_cluster_that_falls_silent_ends_the_command(monkeypatch):
    monkeypatch.setattr(job_client, "_PAUSE", 0)
    monkeypatch.setattr(job_client, "SILENCE", 0.01)
    client = Client()

    def gone(job):
        raise ConnectionError("refused")

    client.get_job_info = gone
    with pytest.raises(StageError, match="the job may still be running: wavemim logs j"):
        job_client.follow(client, "j", lambda _: None)


@pytest.fixture
def job_folder(monkeypatch, tmp_path):
    """The folder that Ray has unpacked for a job, as the working folder of this process."""
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_in_a_job_what_would_be_written_to_its_folder_is_refused(monkeypatch, tmp_path, capsys, job_folder):
    folder = job_folder
    for settings, named in (
        (["images=/mnt/photos"], "out=wavemim-out"),
        ([f"out={folder}/out", "images=/mnt/photos"], f"out={folder}/out"),
        (["out=/mnt/out", "images=photos"], "images=photos"),
    ):
        code, _, err = wavemim(monkeypatch, capsys, "prepare", *settings)
        assert code == 2 and f"wavemim: {named}: in a Ray job this path is in the job's own folder" in err
        assert not list(folder.iterdir())
    elsewhere = ["out=/mnt/out", "images=s3://photos/2024", "checkpoint=timm:vit_base"]
    ray_job.check_places(load("small", elsewhere))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    with pytest.raises(SettingError, match=r"^MLFLOW_TRACKING_URI=mlflow\.db: in a Ray job this path"):
        ray_job.check_places(load("small", elsewhere))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    ray_job.check_places(load("small", elsewhere))
    monkeypatch.chdir(tmp_path)  # of an ordinary machine
    ray_job.check_places(load("small", ["images=photos"]))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["embed", "/mnt/run", "/mnt/photos", "--out", "features.parquet"], "--out features.parquet"),
        (["inspect", "/mnt/shards"], "--picture inspect.png"),
        (["inspect", "/mnt/shards", "--picture", "/mnt/a.png", "--json", "a.json"], "--json a.json"),
        (["show", "/mnt/run", "/mnt/photo.jpg"], "--out show.png"),
        (["compare", "/mnt/run"], "--plot compare.png"),
        (["compare", "/mnt/run", "--plot", "/mnt/a.png", "--json", "a.json"], "--json a.json"),
        (["import", "/mnt/mae.pth", "encoder"], "OUT encoder"),
        (["sync", "wavemim-out"], "RUN wavemim-out"),
        (["sync", "/mnt/out", "tracking.uri=sqlite:///mlflow.db"], "tracking.uri=mlflow.db"),
    ],
)
def test_in_a_job_tools_write_nothing_to_its_folder_either(monkeypatch, tmp_path, capsys, job_folder, arguments, named):
    code, _, err = wavemim(monkeypatch, capsys, *arguments)
    assert code == 2 and err.startswith(f"wavemim: {named}: in a Ray job this path is in the job's own folder")
    assert not list(job_folder.iterdir())
    monkeypatch.chdir(tmp_path)  # of an ordinary machine: another mistake
    assert "in a Ray job" not in wavemim(monkeypatch, capsys, *arguments)[2]


def test_every_file_that_a_tool_writes_is_checked_in_a_job():
    for tool in cli.TOOLS:
        for option in cli._group.get_command(None, tool).params:
            if isinstance(option, click.Option) and (option.metavar or "").startswith("FILE"):
                assert isinstance(option.type, Output), f"{tool} {option.opts[0]}"


def test_the_job_is_known_by_what_ray_sets(monkeypatch):
    monkeypatch.delenv(ray_internals.JOB_CONFIG, raising=False)
    assert ray_job.submission_id() is None
    monkeypatch.setenv(ray_internals.JOB_CONFIG, '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    assert ray_job.submission_id() == "raysubmit_1"
    monkeypatch.setenv(ray_internals.JOB_CONFIG, '{"runtime_env": {}}')
    assert ray_job.submission_id() is None
