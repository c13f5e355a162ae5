"""MLflow for a team: the Compose file holds no password, listens on loopback, and starts the server as MLflow understands it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_commands import commands_of

FILE = Path(__file__).parents[2] / "deploy" / "mlflow" / "compose.yaml"
ENVIRONMENT = {
    "POSTGRES_PASSWORD": "pg",
    "S3_SECRET_KEY": "s3",
    "MLFLOW_ADMIN_PASSWORD": "admin",
    "MLFLOW_SECRET_KEY": "key",
}


def _substituted(text: str) -> str:
    """Compose's ${NAME:-default} and ${NAME:?message}."""

    def value(found: re.Match[str]) -> str:
        name, kind, other = found.groups()
        if kind == ":-":
            return other
        return ENVIRONMENT[name]

    return re.sub(r"\$\{(\w+)(:[-?])([^}]*)\}", value, text)


@pytest.fixture
def services() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())["services"]


def _command(services: dict[str, Any]) -> list[str]:
    return [_substituted(word) for word in services["mlflow"]["command"]]


def test_no_password_is_in_the_file(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET", name):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name  # without it, nothing starts
    assert not re.search(r"://[^/\s]*:[^/\s]*@", FILE.read_text())  # none in an address


def test_one_port_is_published_on_loopback(services: dict[str, Any]) -> None:
    published = {name: [_substituted(port) for port in service.get("ports", [])] for name, service in services.items()}
    assert published == {"postgres": [], "store": [], "mlflow": ["127.0.0.1:5000:5000"]}


def test_mlflow_understands_the_command(services: dict[str, Any]) -> None:
    from mlflow.cli import server

    words = _command(services)
    assert words[:2] == ["mlflow", "server"]
    options = server.make_context("server", words[2:]).params
    assert options["app_name"] == "basic-auth" and options["artifacts_destination"].startswith("s3://")
    assert options["serve_artifacts"] is True  # clients need no key of the store
    bucket = options["artifacts_destination"].removeprefix("s3://").partition("/")[0]
    assert services["store"]["environment"]["S3_BUCKET"] == bucket
    assert {services[name]["environment"]["AWS_SECRET_ACCESS_KEY"] for name in ("store", "mlflow")} == {
        "${S3_SECRET_KEY:?make .env first}"
    }


def test_versions_are_those_of_the_lock(services: dict[str, Any]) -> None:
    docker = services["mlflow"]["build"]["dockerfile_inline"]
    assert f'"mlflow[auth]=={metadata.version("mlflow")}"' in docker
    locked = (Path(__file__).parents[2] / "requirements.lock").read_text()
    assert re.search(r"boto3==\S+", docker)[0] in locked


def test_mlflow_reads_the_configuration_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    configs = yaml.safe_load(FILE.read_text())["configs"]
    file = tmp_path / "auth.ini"
    file.write_text(configs["auth"]["content"])
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(file))
    # the package itself needs Flask-WTF
    source = Path(mlflow.__file__).parent / "server" / "auth" / "config.py"
    spec = importlib.util.spec_from_file_location("auth_config", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    read = module.read_auth_config()
    assert read.auth_cache_ttl_seconds > 0 and read.default_permission == "EDIT" and read.admin_password is None
    assert read.database_uri.rpartition("/")[2] in configs["users"]["content"]


def test_the_command_of_the_header_makes_every_password(tmp_path: Path, services: dict[str, Any]) -> None:
    comments = FILE.read_text().splitlines()
    begin = next(number for number, line in enumerate(comments) if "printf" in line)
    lines = [line.lstrip("# ") for line in comments[begin : begin + 3]]
    subprocess.run(["bash", "-euc", "\n".join(lines)], cwd=tmp_path, check=True)
    made = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    wanted = set(re.findall(r"\$\{(\w+):\?", FILE.read_text()))
    assert set(made) == wanted == set(ENVIRONMENT)
    assert all(len(value) == 48 for value in made.values()) and len(set(made.values())) == len(made)
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    assert any(command[0] == "export" for command in commands_of(FILE))
