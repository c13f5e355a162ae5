"""Poolings of one evaluation by Ray's tasks, against probes of features that are extracted here."""

import pytest
import torch
from stage_calls import run_stage
from tiny_shards import LAYOUT, photos, write_set

from pipeline.config.load import load
from pipeline.evaluation.features import tapped_of
from pipeline.models.build import build_model
from pipeline.models.encoder_source import find_encoder
from pipeline.stages import evaluate
from wavemim.evaluation.features import Taps
from wavemim.evaluation.protocols import evaluate_knn, evaluate_linear
from wavemim.weights import checkpoint

SIDE = LAYOUT.image_size
TINY = [
    f"data.image_size={SIDE}",
    f"data.levels={LAYOUT.levels}",
    f"encoder.image_size={SIDE}",
    "encoder.width=32",
    "encoder.depth=2",
    "encoder.heads=2",
    "decoder.width=16",
    "decoder.heads=2",
    "target.taps={2: 1, 3: 2}",
    "evaluate.probe_strengths=[0.1]",
    "evaluate.knn_k=3",
    "evaluate.protocols=[linear, knn, rank]",
    "tracking.system_metrics=false",
]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_both_poolings_are_measured_the_first_by_all_protocols(ray_local, tmp_path):
    shards = write_set(tmp_path / "shards", photos(36))
    recipe = load("small", [*TINY, f"out={tmp_path}", "evaluate.pool=[token, mean]"])
    model = build_model(recipe, shards)
    state = {"images": 12, "recipe": recipe.dump(), "shards": shards.fingerprint, "wavelet": "haar", "epoch": 1}
    state |= {"pixel_mean": [120.0, 110.0, 100.0], "pixel_std": [60.0, 50.0, 40.0]}
    folder = recipe.stage_dir("pretrain") / "images-000000000012"
    folder.parent.mkdir(parents=True)
    checkpoint.save(folder, model, None, state)
    result = run_stage(evaluate, recipe, ray_local)
    assert result["pools"] == ["token", "mean"]
    subject = find_encoder(recipe, shards)
    for which, encoder in (("trained", subject.model()), ("untrained", subject.beginning())):
        measured = result["measured"][which]
        assert "eval/rankme" in measured and "eval/rankme_mean" not in measured
        for pool, name in (("token", ""), ("mean", "mean")):
            torch.manual_seed(0)
            taps = Taps(encoder.eval(), blocks=False, tokens=False, pools=(pool,))
            settled = {"window": SIDE, "batch": 5}
            train, val = (
                tapped_of(taps, subject.inputs(shards), shards, split, **settled).set for split in ("train", "val")
            )
            expected = evaluate_linear(train, val, strengths=(0.1,), seed=recipe.seed, pool=name).values
            expected |= evaluate_knn(train, val, k=3, curve=(), pool=name).values
            assert {key: measured[key] for key in expected} == pytest.approx(expected, abs=1e-6), (which, pool)
    assert not any("_mean_" in key or "_token_" in key for key in result["measured"]["pixels"])
    text = evaluate.summary(recipe, result)
    assert "linear probe, class token" in text and "kNN, mean of the patch tokens" in text
