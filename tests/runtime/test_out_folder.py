"""Whether the out folder can be used, and is seen by every node."""

import pytest

from pipeline.config.load import load
from pipeline.errors import SettingError
from pipeline.runtime import out_folder
from pipeline.runtime.out_folder import _problem, _token, check_nodes, prepare_out
from pipeline.runtime.ray_session import SessionInfo
from pipeline.storage.folder import Folder

pytest_plugins = ["s3_server"]


def test_a_node_sees_a_file_of_the_driver_or_says_why_not(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(out_folder, "_PAUSES", (0.01,))
    for folder in (Folder.at(tmp_path / "new" / "out"), bucket.sub("out")):
        with _token(folder) as (place, token):
            assert _problem(place, token) == ""
        assert "not" in _problem(folder, token).lower()
    assert not (tmp_path / "new").exists()  # nothing is left of a check
    assert _problem(Folder.at("s3://b/x?endpoint_override=127.0.0.1:9&scheme=http"), "x").endswith(")")  # no answer


def test_what_this_machine_alone_has_is_said(bucket, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = []
    recipe = load("small", ["name=a", f"out={bucket.url}"])
    prepare_out(recipe, said.append)
    prepare_out(load("small", ["name=a", f"out={bucket.url}", "tracking.uri=http://127.0.0.1:1"]), said.append)
    prepare_out(load("small", ["out=here"]), said.append)
    assert len(said) == 2 and all(str(recipe.local_out) in line for line in said)
    assert "mlflow.db; wavemim sync" in said[0] and "mlflow.db" not in said[1]
    with pytest.raises(SettingError, match="scheme 'nosuch' cannot be used"):
        prepare_out(load("small", ["name=a", "out=nosuch://x/y"]), said.append)


@pytest.mark.ray
def test_a_folder_that_a_node_does_not_see_is_refused_in_a_line(ray_local, tmp_path, monkeypatch):
    two = SessionInfo(2, 0, 2, ray_local.address, private=False)
    recipe = load("small", [f"out={tmp_path}/out"])
    check_nodes(recipe, two)
    monkeypatch.setattr(out_folder, "_problem", lambda folder, token: "not there")
    with pytest.raises(
        SettingError, match=rf"^out={tmp_path}/out is not visible on node 127\.0\.0\.1: use a folder that all"
    ):
        check_nodes(recipe, two)
    assert not (tmp_path / "out").exists()
    check_nodes(recipe, ray_local)  # one machine: nothing to check
