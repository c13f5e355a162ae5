"""Which machines the stages start, by Ray's own autoscaler: for cluster.yaml, its variants, and the RayCluster."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.data
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.train._internal.autoscaling_coordinator_client import build_train_resource_request
from ray.tune.execution.placement_groups import resource_dict_to_pg_factory
from ray_autoscaler import PaperCluster, grow_for_ray_data

from pipeline.config.load import load
from pipeline.runtime.ray_session import SessionInfo
from pipeline.stages import evaluate, prepare
from pipeline.stages.prepare_task import Unit
from pipeline.workers import group

ROOT = Path(__file__).parents[2]
CPUS, GPUS = "cpu_worker", "gpu_worker"


def _aws() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def _gcp() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text() + (ROOT / "deploy" / "cluster-gcp.yaml").read_text())


def _kubernetes() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy" / "raycluster.yaml").read_text())
    cluster = next(document for document in documents if document["kind"] == "RayCluster")
    cluster["metadata"].setdefault("namespace", "default")
    return _derive_autoscaling_config_from_ray_cr(cluster)


@pytest.fixture(params=[_aws, _gcp, _kubernetes])
def cluster(request: pytest.FixtureRequest) -> PaperCluster:
    return PaperCluster(request.param())


def _most(cluster: PaperCluster, kind: str) -> int:
    return int(cluster.autoscaling.get_node_type_configs()[kind].max_worker_nodes)


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    return load("small", [f"out={tmp_path}", "cluster.gpus=true", "train.workers=8", "tune.gpus_per_trial=0.25"])


def _map_of_prepare(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of prepare's `Dataset.map`, from the stage itself."""
    seen: dict[str, Any] = {}

    class Recorder:
        def map(self, function: Any, **arguments: Any) -> Any:
            seen.update(arguments)
            return SimpleNamespace(iter_rows=lambda: iter(()))

    monkeypatch.setattr(ray.data, "from_items", lambda *items, **more: Recorder())
    task = SimpleNamespace(folder=SimpleNamespace(remove=lambda name: None))
    unit = Unit.__new__(Unit)
    object.__setattr__(unit, "name", "train-00000")
    session = SessionInfo(cpus=0, gpus=0, nodes=1, address="", private=False)
    list(prepare._run_tasks([unit], task, session))
    return seen


def test_prepare_starts_all_cpu_machines_and_no_other(cluster: PaperCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    task = _map_of_prepare(monkeypatch)
    grow_for_ray_data(cluster, task, waiting=0)
    assert cluster.workers == Counter({CPUS: _most(cluster, CPUS)})
    grow_for_ray_data(cluster, task, waiting=64)  # the tasks of two spot machines that were lost
    assert cluster.workers == Counter({CPUS: _most(cluster, CPUS)})


def test_tasks_without_memory_would_start_gpu_machines(cluster: PaperCluster) -> None:
    """What the test above holds is due to the tasks' memory."""
    grow_for_ray_data(cluster, {"num_cpus": 1}, waiting=64)
    assert cluster.workers[CPUS] == _most(cluster, CPUS) and cluster.workers[GPUS] > 0


def test_eight_workers_of_pretraining_start_eight_gpu_machines(cluster: PaperCluster, recipe: Any) -> None:
    session = SimpleNamespace(gpus=0.0, cpus=4.0, private=False)
    trainer = group._trainer({}, recipe, session, Path(recipe.out), recipe.train.workers)
    bundles, _ = build_train_resource_request(trainer.scaling_config, recipe.train.workers)
    assert cluster.demand(gangs=[bundles], at_least=bundles)  # Ray Train asks twice for the same
    assert cluster.workers == Counter({GPUS: 8})
    assert not cluster.demand(gangs=[[*bundles, bundles[0]]])  # a ninth is refused, and nothing else is started for it
    assert cluster.workers == Counter({GPUS: 8})


@pytest.mark.parametrize(("concurrent", "machines"), [(1, 1), (4, 1), (5, 2), (32, 8)])
def test_trials_share_gpu_machines(cluster: PaperCluster, recipe: Any, concurrent: int, machines: int) -> None:
    resources = {"cpu": recipe.cluster.cpus_per_worker, "gpu": recipe.tune.gpus_per_trial}
    trial = resource_dict_to_pg_factory(resources).bundles
    assert cluster.demand(gangs=[trial] * concurrent)
    assert cluster.workers == Counter({GPUS: machines})


def _options_in_evaluate(**options: Any) -> dict[str, float]:
    tasks = evaluate._Tasks.__new__(evaluate._Tasks)
    tasks.meter = SimpleNamespace(around=lambda function, **more: function)
    asked = tasks._remote(_aws, **options)._default_options
    return {"CPU": asked.get("num_cpus", 0), "GPU": asked.get("num_gpus", 0)}


def test_evaluation_reads_on_gpu_machines_and_fits_probes_on_the_head(cluster: PaperCluster) -> None:
    assert cluster.demand([_options_in_evaluate(num_gpus=1)] * 3)
    assert cluster.workers == Counter({GPUS: 3})
    again = PaperCluster(cluster.config)
    again.demand([_options_in_evaluate()] * 4)
    assert not again.workers
    again.demand([_options_in_evaluate()] * 40, used=1.0)
    assert set(again.workers) == {CPUS}


def test_nothing_is_started_without_demand(cluster: PaperCluster) -> None:
    assert cluster.demand() and not cluster.workers
