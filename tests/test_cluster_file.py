"""cluster.yaml is what Ray's launcher accepts, and keeps the promises of its comments."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER_FILE = Path(__file__).parents[1] / "cluster.yaml"
# Ray's schema lets every key of `provider` through; these are the ones its AWS provider reads.
AWS_PROVIDER_KEYS = {
    "type",
    "region",
    "availability_zone",
    "cache_stopped_nodes",
    "use_internal_ips",
    "security_group",
    "cloudwatch",
}
Config = dict[str, Any]


def check(config: Config) -> None:
    """Raises where Ray's own validation does, and where it should."""
    validate_config(prepare_config(copy.deepcopy(config)))
    if not config.get("cluster_name"):
        raise ValueError("no cluster_name")
    if unknown := set(config["provider"]) - AWS_PROVIDER_KEYS:
        raise ValueError(f"unknown provider keys {unknown}")
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        command = config[start][-1]
        for needed in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=", "RAY_USAGE_STATS_ENABLED=0", "ray start"):
            if needed not in command:
                raise ValueError(f"{start}: {needed} is missing")
    if "--dashboard-host=127.0.0.1" not in config["head_start_ray_commands"][-1]:
        raise ValueError("the dashboard is not bound to loopback")
    if not any("requirements.lock" in command for command in config["setup_commands"]):
        raise ValueError("the locked requirements are not installed")
    workers = config["available_node_types"]["gpu_worker"]
    if workers["min_workers"] != 0 or workers["max_workers"] > config["max_workers"]:
        raise ValueError("numbers of workers")


@pytest.fixture
def config() -> Config:
    return yaml.safe_load(CLUSTER_FILE.read_text(encoding="utf-8"))


def test_ray_accepts_the_file(config: Config) -> None:
    check(config)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("cluster_name"),
        lambda c: c.pop("provider"),
        lambda c: c.update(max_worker=3),
        lambda c: c.update(max_workers="many"),
        lambda c: c.update(head_node_type="nobody"),
        lambda c: c["provider"].update(regoin="us-east-1"),
        lambda c: c["available_node_types"]["gpu_worker"].update(min_worker=1),
        lambda c: c["available_node_types"]["gpu_worker"].update(max_workers=9),
        lambda c: c["available_node_types"]["head"].pop("node_config"),
        lambda c: c.update(setup_commands=[]),
        lambda c: c.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
        lambda c: c["head_start_ray_commands"].append(
            c["head_start_ray_commands"].pop().replace("127.0.0.1", "0.0.0.0")
        ),
    ],
)
def test_a_broken_copy_is_refused(config: Config, damage: Callable[[Config], object]) -> None:
    check(config)  # so that it is the damage that is refused
    damage(config)
    with pytest.raises(Exception, match=r"."):
        check(config)


def test_the_commands_of_the_header_are_ones_that_exist() -> None:
    from pipeline.config.load import load

    header = [line.removeprefix("#").strip() for line in CLUSTER_FILE.read_text().splitlines() if line.startswith("#")]
    words = " ".join(header).replace("\\", " ").split()
    begin = words.index("wavemim", words.index("--working-dir"))
    command = words[begin : words.index("ray", begin)]
    assert command[:3] == ["wavemim", "run", "--recipe"]
    recipe = load(command[3], command[4:])
    assert recipe.cluster.gpus is True and Path(recipe.out).is_absolute()
