"""The encoder elsewhere: timm and transformers offline, ONNX beside PyTorch, MLflow's registry without this project."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from stage_calls import run_stage
from tiny_checkpoint import SIDE, SMALL, write_checkpoint
from tiny_images import images_of

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError, StageError
from pipeline.stages import export as export_stage
from pipeline.stages.export import register, summary
from pipeline.stages.model_card import model_card
from wavemim.weights import onnx_export
from wavemim.weights.onnx_export import NormalisedEncoder, export_onnx


def recipe_for(out, *settings):
    return load("small", [*SMALL, f"out={out}", "tracking.system_metrics=false", *settings])


def evaluated(recipe, checkpoint_sha):
    """What `wavemim evaluate` leaves."""
    folder = recipe.stage_dir("evaluate")
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"checkpoint": checkpoint_sha}))
    measured = {
        "trained": {"eval/linear_top1": 61.25, "eval/linear_top1_low": 58.0, "eval/linear_top1_high": 64.4},
        "untrained": {"eval/linear_top1": 40.0},
    }
    result = {"measured": measured, "train_images": 80, "val_images": 1234, "classes": 3}
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run whose encoder was exported and registered; (out, recipe, model, statistics, summary)."""
    out = tmp_path_factory.mktemp("out")
    recipe = recipe_for(out, "export.registry=cats")
    model, statistics = write_checkpoint(recipe.stage_dir("pretrain") / "images-000000000008")
    return out, recipe, model, statistics, run_stage(export_stage, recipe)


def pixels_of(count=3):
    return torch.from_numpy(images_of(count, 3, SIDE, seed=9))


def picture_of(pixels):
    return Image.fromarray(pixels[0].numpy().astype(np.uint8).transpose(1, 2, 0))


def expected_of(model, statistics, pixels):
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (statistics.pixel_mean, statistics.pixel_std))
    with torch.inference_mode():
        return model.encoder.model((pixels - mean) / std).numpy()


def test_transformers_opens_the_folder_offline_and_gives_the_features(exported, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from transformers import AutoImageProcessor, AutoModel

    _, _, model, statistics, result = exported
    pixels = pixels_of(1)
    processor = AutoImageProcessor.from_pretrained(result["encoder"])
    encoder = AutoModel.from_pretrained(result["encoder"]).eval()
    assert type(encoder).__name__ == "TimmWrapperModel"
    with torch.inference_mode():
        found = encoder(**processor(picture_of(pixels), return_tensors="pt")).pooler_output.numpy()
    assert np.abs(found - expected_of(model, statistics, pixels)).max() < 1e-5


def test_timm_takes_size_and_normalisation_from_the_folder(exported):
    _, _, model, statistics, result = exported
    encoder = timm.create_model(f"local-dir:{result['encoder']}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
    pixels = pixels_of(1)
    with torch.inference_mode():
        found = encoder(transform(picture_of(pixels))[None]).numpy()
    assert np.abs(found - expected_of(model, statistics, pixels)).max() < 1e-5


REGISTRY = """
import sys
sys.modules.update(dict.fromkeys(("wavemim", "pipeline", "timm", "torch")))  # importing these fails
import json, numpy, mlflow
uri, name, images, out = sys.argv[1:]
mlflow.set_tracking_uri(uri)
model = mlflow.pyfunc.load_model(name)
pixels = numpy.load(images)
numpy.savez(out, features=model.predict(pixels)["features"], example=model.predict(model.input_example)["features"])
print(json.dumps({"inputs": model.metadata.signature.inputs.to_dict(), "flavours": sorted(model.metadata.flavors)}))
"""


def test_the_registered_model_loads_without_this_project(exported, tmp_path):
    out, _, model, statistics, result = exported
    assert result["registered"]["name"] == "cats" and result["registered"]["version"] == "1"
    pixels = pixels_of(5)
    np.save(tmp_path / "p.npy", pixels.numpy())
    arguments = [f"sqlite:///{out}/mlflow.db", "models:/cats/1", str(tmp_path / "p.npy"), str(tmp_path / "x.npz")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", REGISTRY, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "x.npz")
    assert np.abs(found["features"] - expected_of(model, statistics, pixels)).max() < 1e-4
    assert found["example"].shape == (1, 32)
    about = json.loads(done.stdout.splitlines()[-1])
    assert about["inputs"] == [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 3, SIDE, SIDE]}}]
    assert about["flavours"] == ["onnx", "python_function"]
    kept = {path.suffix for path in (out / "mlartifacts").rglob("*") if path.is_file()}
    assert not kept & {".pkl", ".pth", ".pickle", ".bin", ".cloudpickle"}


def test_the_version_names_its_run_and_data(exported):
    from mlflow import MlflowClient

    out, _, _, _, result = exported
    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    version = client.get_model_version("cats", "1")
    assert version.tags == {"wavemim.shards": "abc", "wavemim.images_seen": "8", "sha256": result["sha256"]}
    run = client.get_run(version.run_id)
    assert run.info.run_name == "export-small"
    names = {item.path for item in client.list_artifacts(version.run_id, "encoder")}
    assert names == {
        f"encoder/{n}" for n in ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    }


def test_the_card_gets_what_evaluation_measured_and_nothing_is_done_twice(exported):
    _, recipe, _, _, result = exported
    card = (recipe.stage_dir("export") / "encoder" / "README.md").read_text()
    assert "Not evaluated." in card and "shard set abc" in card and "8 images seen" in card
    assert run_stage(export_stage, recipe)["state"] == "finished already"
    state = json.loads((recipe.stage_dir("pretrain") / "images-000000000008" / "state.json").read_text())
    evaluated(recipe, "of another checkpoint")
    assert run_stage(export_stage, recipe)["state"] == "finished already"
    (recipe.stage_dir("evaluate") / "settings.json").write_text(
        json.dumps({"checkpoint": state["files"]["model.safetensors"]})
    )
    again = run_stage(export_stage, recipe)
    assert again["state"] == "renewed"
    assert again["registered"] == result["registered"] and again["sha256"] == result["sha256"]
    card = (recipe.stage_dir("export") / "encoder" / "README.md").read_text()
    assert "| `eval/linear_top1` | 61.2 | 58.0 to 64.4 | 40.0 |" in card and "1,234 val images" in card
    assert str(recipe.out) not in card
    assert run_stage(export_stage, recipe)["state"] == "finished already"
    assert "cats" in summary(recipe, again) and "encoder.onnx" in summary(recipe, again)


def test_a_hierarchy_of_other_channels_is_the_same_in_onnx_for_any_batch(tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    encoder = timm.create_model("convnext_atto", in_chans=2, num_classes=0, depths=[1] * 4, dims=[4, 8, 8, 16]).eval()
    mean, std = [100.0, 120.0], [50.0, 60.0]
    found = export_onnx(tmp_path / "o", encoder, image_size=32, pixel_mean=mean, pixel_std=std, about={})
    assert found["features"] == 16 and found["largest_difference"] < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    file = tmp_path / "o" / "encoder.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    pixels = images_of(7, 2, 32)
    with torch.inference_mode():
        normal = (torch.from_numpy(pixels) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        expected = encoder(normal).numpy()
    assert np.abs(session.run(["features"], {"pixels": pixels})[0] - expected).max() < 1e-4
    with torch.no_grad():
        encoder.head.norm.bias += 1e-2
    with pytest.raises(ValueError, match=r"differs from PyTorch by 0\.01 on 1 random images, 0\.0001 is allowed"):
        onnx_export._compare(file, NormalisedEncoder(encoder, mean, std), (2, 32, 32))


def test_missing_packages_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export_stage, "missing_packages", lambda: ["onnxscript"])
    for setting in ("export.onnx=true", "export.registry=cats"):
        with pytest.raises(
            SettingError,
            match=rf"^{re.escape(setting)} needs .* onnxscript cannot be imported; pip install 'wavemim\[onnx\]'$",
        ):
            run_stage(export_stage, recipe_for(tmp_path, setting))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(onnx_export, "PACKAGES", ("onnx", "no_such_package"))
    assert onnx_export.missing_packages() == ["no_such_package"]


def test_a_store_that_is_away_costs_the_registration_alone(exported, tmp_path):
    out, _, _, _, result = exported
    away = recipe_for(out, "export.registry=dogs", "tracking.uri=http://127.0.0.1:9")
    with pytest.raises(StageError, match=r"export\.registry=dogs: MLflow at http://127\.0\.0\.1:9.*to retry"):
        run_stage(export_stage, away)
    with pytest.raises(StageError, match="does not answer"):  # the run has never reached it
        register(away, tmp_path, result["onnx"], name="dogs", about={})
    kept = json.loads((away.stage_dir("export") / "result.json").read_text())
    assert kept["registered"] == result["registered"]
    again = run_stage(export_stage, recipe_for(out, "export.registry=dogs"))["registered"]
    assert (again["name"], again["version"]) == ("dogs", "1")


def test_the_cards_code_runs_for_other_channels_and_small_numbers_are_not_lost(tmp_path):
    recipe = with_overrides(load("small"), {"data.channels": 6, "data.image_size": 32, "encoder.image_size": 32})
    measured = {"eval/linear_top1": 30.04, "eval/alpha_req": 1.043, "eval/linear_strength": 0.01}
    evaluation = {"measured": {"trained": measured}}
    card = model_card(recipe, {"images": 5, "shards": "abc"}, evaluation, 192)
    assert "| `eval/linear_top1` | 30.0 |" in card and "| `eval/alpha_req` | 1.04 |" in card
    assert "linear_strength" not in card
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, in_chans=6, num_classes=0)
    model.pretrained_cfg |= {"mean": [0.5] * 6, "std": [0.2] * 6}
    code = card.split("```python")[1].split("```")[0]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *_, **__: model)
        exec(code, found)  # what a reader of the card would paste
    assert found["features"].shape == (1, 192)
