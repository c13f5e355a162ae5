"""Passwords, keys and tokens are kept nowhere: each way by which one could reach a file or a log."""

import pickle
from types import SimpleNamespace

import pytest
from stage_calls import wavemim

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.runtime import ray_internals
from pipeline.tracking import errors, store_uris
from pipeline.tracking.tracker import RunHandle, ui_command

URIS = {
    "http://me:PLANTED@mlflow:5000": "http://me:***@mlflow:5000",
    "postgresql://me:PLA/NT@ED@db:5432/runs": "postgresql://me:***@db:5432/runs",  # a password with / and @
    "postgresql://me:12345@db/runs": "postgresql://me:***@db/runs",
    "mysql://db/runs?user=me&password=PLANTED&charset=utf8": "mysql://db/runs?user=me&password=***&charset=utf8",
    "https://host/api?access_token=PLANTED": "https://host/api?access_token=***",
}
OPEN = [
    "http://mlflow:5000/a@b",
    "http://mlflow:5000",
    "sqlite:////mnt/a:b@c/runs.db",
    "databricks",
    "s3://bucket/a?region=eu",
]


@pytest.mark.parametrize(("uri", "shown"), URIS.items())
def test_passwords_are_masked_in_uris_and_in_texts_with_them(uri, shown):
    assert store_uris.without_password(uri) == shown
    assert store_uris.without_password(f"no answer from '{uri}' in 3 s") == f"no answer from '{shown}' in 3 s"
    assert errors.reason(OSError(f"no answer from {uri}")).endswith(shown)


@pytest.mark.parametrize("uri", OPEN)
def test_what_holds_no_password_stays_as_it_is(uri):
    assert store_uris.without_password(uri) == uri


@pytest.mark.parametrize("uri", [uri for uri in URIS if uri.count("/") < 5])
def test_a_password_in_tracking_uri_is_refused_wherever_it_is_given(monkeypatch, capsys, tmp_path, uri):
    (tmp_path / "mine.yaml").write_text(f"base: small\ntracking: {{uri: '{uri}'}}\n")
    out = f"out={tmp_path / 'out'}"
    for arguments in (["-r", "small", f"tracking.uri={uri}"], ["-r", str(tmp_path / "mine.yaml")]):
        code, said, err = wavemim(monkeypatch, capsys, "pretrain", *arguments, out)
        assert code == 2 and "MLFLOW_TRACKING_URI" in err and err.count("\n") == 1
        assert "PLANTED" not in said + err and "12345" not in said + err
    assert not (tmp_path / "out").exists()


def test_settings_that_older_checkpoints_hold_can_still_be_read():
    assert with_overrides(load("small"), {"tracking.uri": "http://me:PLANTED@mlflow"}).tracking.uri


def test_a_key_in_a_place_is_refused_without_being_shown(monkeypatch, capsys):
    for key in ("images", "shards", "train.checkpoints_at"):
        code, _, err = wavemim(monkeypatch, capsys, "run", f"{key}=s3://KEY:PLANTED@bucket/x")
        assert code == 2 and f"{key}: a URL with credentials" in err and "PLANTED" not in err
    with pytest.raises(SettingError) as caught:
        load("small", ["shards=s3://bucket/x?secret_key=PLANTED"])
    assert "PLANTED" not in str(caught.value)


def test_the_address_that_workers_get_is_not_shown_by_what_they_log(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:PLANTED@mlflow:5000")
    handle = RunHandle("http://me:PLANTED@mlflow:5000", "1", "/mnt/out/metrics.jsonl")
    assert "PLANTED" not in f"{handle!r} {handle} {[handle]} {SimpleNamespace(handle=handle)}"
    assert pickle.loads(pickle.dumps(handle)).uri == handle.uri  # noqa: S301
    assert "PLANTED" not in ui_command(load("small"))


def test_ray_tune_does_not_write_keys_into_the_environment_of_trials(monkeypatch):
    import ray
    from ray.tune.execution.class_cache import _ActorClassCache

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "PLANTED")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "PLANTED")
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    made = []
    monkeypatch.setattr(ray, "remote", lambda **options: made.append(options) or (lambda cls: cls))
    with ray_internals.no_credentials_in_trials():
        _ActorClassCache().get(object)
    _ActorClassCache().get(object)
    inside, outside = [options["runtime_env"]["env_vars"] for options in made]
    assert "PLANTED" not in inside.values()
    assert "PLANTED" in outside.values()  # otherwise Ray has changed, and the block is not needed any more
