"""cluster.yaml and its variants are what Ray's launcher accepts, and keep the promises of their comments."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_commands import check_wavemim, commands_of
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
CLUSTER_FILE = ROOT / "cluster.yaml"
VARIANTS = {"aws": None, "gcp": "cluster-gcp.yaml", "local": "cluster-own-hosts.yaml"}
# Ray's schema lets every key of `provider` through; these are the ones its providers read.
PROVIDER_KEYS = {
    "aws": {"region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group", "cloudwatch"},
    "gcp": {"region", "availability_zone", "project_id", "cache_stopped_nodes", "use_internal_ips"},
    "local": {"head_ip", "worker_ips", "external_head_ip", "coordinator_address"},
}
Config = dict[str, Any]


def check(config: Config) -> None:
    """Raises where Ray's own validation does, and where it should."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    if not config.get("cluster_name"):
        raise ValueError("no cluster_name")
    provider = config["provider"]
    if unknown := set(provider) - PROVIDER_KEYS[provider["type"]] - {"type"}:
        raise ValueError(f"unknown provider keys {unknown}")
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        command = config[start][-1]
        for needed in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=", "RAY_USAGE_STATS_ENABLED=0", "ray start"):
            if needed not in command:
                raise ValueError(f"{start}: {needed} is missing")
    for needed in ("--dashboard-host=127.0.0.1", "RAY_JOB_STOP_WAIT_TIME_S=60"):
        if needed not in config["head_start_ray_commands"][-1]:
            raise ValueError(f"{needed} is missing")
    if not any("requirements.lock" in command for command in config["setup_commands"]):
        raise ValueError("the locked requirements are not installed")
    for name, kind in config["available_node_types"].items():
        if name != "head" and (kind["min_workers"] != 0 or kind["max_workers"] > config["max_workers"]):
            raise ValueError("numbers of workers")
    most = sum(kind["max_workers"] for kind in prepared["available_node_types"].values())
    if config["max_workers"] > most:
        raise ValueError("max_workers")


def read(variant: str = "aws") -> Config:
    """The file as it is, or followed by the keys of a variant, as the variant's header says."""
    replaced = VARIANTS[variant]
    return yaml.safe_load(CLUSTER_FILE.read_text() + ((ROOT / "deploy" / replaced).read_text() if replaced else ""))


@pytest.fixture
def config() -> Config:
    return read()


@pytest.mark.parametrize("variant", VARIANTS)
def test_ray_accepts_the_files(variant: str) -> None:
    config = read(variant)
    check(config)
    assert config["provider"]["type"] == variant
    if variant != "aws":
        text = (ROOT / "deploy" / str(VARIANTS[variant])).read_text()
        assert f"cat cluster.yaml deploy/{VARIANTS[variant]} > my-cluster.yaml" in text
        assert set(yaml.safe_load(text)) <= set(read())  # it replaces keys, and misspells none


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("cluster_name"),
        lambda c: c.pop("provider"),
        lambda c: c.update(max_worker=3),
        lambda c: c.update(max_workers="many"),
        lambda c: c.update(max_workers=99),
        lambda c: c.update(head_node_type="nobody"),
        lambda c: c["provider"].update(regoin="us-east-1"),
        lambda c: c["available_node_types"]["gpu_worker"].update(min_worker=1),
        lambda c: c["available_node_types"]["cpu_worker"].update(min_workers=1),
        lambda c: c["available_node_types"]["gpu_worker"].update(max_workers=16),
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
    commands = commands_of(CLUSTER_FILE)
    (submitted,) = [command for command in commands if command[:3] == ["ray", "job", "submit"]]
    recipe = check_wavemim(submitted[submitted.index("--") + 1 :])
    assert recipe.train.workers <= read()["available_node_types"]["gpu_worker"]["max_workers"]
    used = {tuple(command[:3]) if command[0] == "aws" else tuple(command[:2]) for command in commands}
    assert {("ray", "up"), ("ray", "dashboard"), ("ray", "get-auth-token"), ("ray", "down")} <= used
    stack = next(command for command in commands if command[:3] == ["aws", "cloudformation", "deploy"])
    template = yaml.safe_load((ROOT / stack[stack.index("--template-file") + 1]).read_text())
    assert set(template["Parameters"]) == {stack[stack.index("--parameter-overrides") + 1].split("=")[0]}


# --- what Ray's launcher makes of it on AWS, on an AWS of this machine


def _roles(account: Any) -> dict[str, list[dict[str, Any]]]:
    """Create the instance profiles of aws-roles.yaml; returns the statements of each role, its bucket named `photos`."""
    resources = yaml.safe_load((ROOT / "deploy" / "aws-roles.yaml").read_text())["Resources"]
    text = json.dumps(resources).replace("${AWS::Partition}", "aws").replace("${Bucket}", "photos")
    made = json.loads(text)
    bucket = made["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    statements = {}
    for key in ("Head", "Worker"):
        role, profile = made[f"{key}Role"]["Properties"], made[f"{key}Profile"]["Properties"]
        name = role["RoleName"]
        account.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(role["AssumeRolePolicyDocument"]))
        account.create_instance_profile(InstanceProfileName=profile["InstanceProfileName"])
        account.add_role_to_instance_profile(InstanceProfileName=profile["InstanceProfileName"], RoleName=name)
        own = [s for policy in role.get("Policies", []) for s in policy["PolicyDocument"]["Statement"]]
        statements[name] = bucket + own
    return statements


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """cluster.yaml after Ray has prepared AWS for it, the roles' statements, and one machine of each type."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # for the key pair
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        from ray.autoscaler._private.aws import utils
        from ray.autoscaler._private.aws.config import bootstrap_aws

        (Path.home() / ".ssh").mkdir()
        config = prepare_config(read())
        region = config["provider"]["region"]
        ec2 = boto3.client("ec2", region_name=region)
        statements = _roles(boto3.client("iam", region_name=region))
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for kind in config["available_node_types"].values():
            kind["node_config"]["ImageId"] = image
        utils.resource_cache.cache_clear()
        ready = bootstrap_aws(config)
        machines = {}
        for name, kind in ready["available_node_types"].items():
            launch = {k: v for k, v in kind["node_config"].items() if k not in ("SubnetIds", "SecurityGroupIds")}
            network = {"SecurityGroupIds": kind["node_config"]["SecurityGroupIds"]}
            started = ec2.run_instances(**launch, **network, MinCount=1, MaxCount=1)["Instances"][0]
            machines[name] = ec2.describe_instances(InstanceIds=[started["InstanceId"]])["Reservations"][0][
                "Instances"
            ][0]
        yield {"config": ready, "statements": statements, "machines": machines, "ec2": ec2}
        utils.resource_cache.cache_clear()


def test_no_port_is_open_but_ssh(launched: dict[str, Any]) -> None:
    groups = {
        g
        for kind in launched["config"]["available_node_types"].values()
        for g in kind["node_config"]["SecurityGroupIds"]
    }
    rules = launched["ec2"].describe_security_groups(GroupIds=list(groups))["SecurityGroups"][0]["IpPermissions"]
    from_outside = [rule for rule in rules if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert len(groups) == 1 and [(rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [(22, 22)]


def test_machines_use_the_bucket_by_their_role(launched: dict[str, Any]) -> None:
    """The EC2 API accepts every node_config, which names a profile of aws-roles.yaml, and gives its keys to IMDSv2 only."""
    for name, machine in launched["machines"].items():
        profile = machine["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        assert profile == ("wavemim-head" if name == "head" else "wavemim-worker")
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        allowed = {action for s in launched["statements"][profile] for action in _listed(s["Action"])}
        assert {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"} <= allowed
        assert ("iam:PassRole" in allowed) == ("ec2:RunInstances" in allowed) == (name == "head")
    spot = {name for name, machine in launched["machines"].items() if machine.get("InstanceLifecycle") == "spot"}
    kinds = launched["config"]["available_node_types"]
    assert {name for name, kind in kinds.items() if "InstanceMarketOptions" in kind["node_config"]} == {
        "cpu_worker",
        "gpu_worker",
    }
    assert "head" not in spot
    for statement in launched["statements"]["wavemim-worker"]:
        assert all(action.startswith("s3:") for action in _listed(statement["Action"]))
        assert str(_arn(statement["Resource"])).startswith("arn:aws:s3:::photos")


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _arn(resource: Any) -> Any:
    return resource["Fn::Sub"] if isinstance(resource, dict) and "Fn::Sub" in resource else resource
