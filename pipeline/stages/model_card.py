"""The model card of an exported encoder: its architecture, training, evaluation and use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.behaviour import values_of
from pipeline.config.recipe import BEHAVIOURS, Recipe
from pipeline.storage.folder import Folder
from wavemim import __version__

_NO_RESULTS = ("_low", "_high", "_n", "_converged", "_strength", "_lr", "_images", "_labels", "_std")
_USE = """\
```python
import timm, torch
from PIL import Image

encoder = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
with torch.inference_mode():
    features = encoder(transform(Image.open("photo.jpg"))[None])  # (1, {features})
```

```python
from transformers import AutoImageProcessor, AutoModel

processor, encoder = AutoImageProcessor.from_pretrained("FOLDER"), AutoModel.from_pretrained("FOLDER").eval()
features = encoder(**processor(image, return_tensors="pt")).pooler_output
```
"""


_USE_CHANNELS = """\
```python
import timm, torch

encoder = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
mean, std = (torch.tensor(encoder.pretrained_cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
pixels = torch.rand(1, {channels}, {size}, {size})  # images of {channels} channels in [0, 1]
with torch.inference_mode():
    features = encoder((pixels - mean) / std)  # (1, {features})
```
"""


def model_card(trained: Recipe, state: Mapping[str, Any], evaluation: Mapping[str, Any] | None, features: int) -> str:
    """Write the card.

    Args:
        trained: The settings with which the encoder was trained.
        state: The state of its checkpoint.
        evaluation: What `wavemim evaluate` measured of it, if it did.
        features: Number of features.

    Returns:
        The card as Markdown.
    """
    encoder, channels = trained.encoder, trained.data.channels
    about = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "transformers", "image-feature-extraction", "self-supervised", "wavemim"],
    }
    facts = {
        "architecture": f"{encoder.name}, {features} features",
        "images": f"{channels} channels, {encoder.image_size} × {encoder.image_size} pixels",
        "pretraining": f"{_target(trained)}; {int(state['images']):,} images seen",
        "data": f"shard set {state['shards']}",
        "made by": f"wavemim {__version__}, recipe {trained.name}, seed {trained.seed}",
    }
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {trained.name}",
        "A vision encoder, pretrained by masked image modelling without labels. It has no classifier: it returns features.",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        "## Use",
        (_USE if channels == 3 else _USE_CHANNELS)
        .replace("{features}", str(features))
        .replace("{channels}", str(channels))
        .replace("{size}", str(encoder.image_size))
        .rstrip(),
        "## Evaluation",
        _measured(evaluation),
        "## Recipe",
        f"```yaml\n{_recipe(trained)}```",
    ]
    return "\n\n".join(parts) + "\n"


def evaluation_of(recipe: Recipe, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the run's `evaluate` measured of the checkpoint with this state; None if it has not evaluated this one."""
    folder = Folder.at(recipe.stage_home("evaluate") or recipe.stage_dir("evaluate"))
    settings, result = _json(folder, "settings.json"), _json(folder, "result.json")
    if result is None or settings is None or settings.get("checkpoint") not in state["files"].values():
        return None
    return result if isinstance(result.get("measured"), dict) else None


def _json(folder: Folder, name: str) -> dict[str, Any] | None:
    try:
        content = json.loads(folder.read(name))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _target(trained: Recipe) -> str:
    share = "" if trained.mask.kind == "frequency" else f" of {trained.mask.ratio:.0%} of each image"
    taps = ", ".join(f"level {level} from block or stage {tap}" for level, tap in sorted(trained.target.taps.items()))
    what = f"predicts {trained.target.kind}{share}"
    return f"{what} ({taps})" if trained.target.kind in ("wavelet", "hog") else what


def _measured(evaluation: Mapping[str, Any] | None) -> str:
    subjects = evaluation["measured"] if evaluation else {}
    trained = subjects.get("trained") or {}
    others = [name for name in subjects if name != "trained" and isinstance(subjects[name], dict)]
    lines = []
    for name, value in trained.items():
        if not isinstance(value, int | float) or name.endswith(_NO_RESULTS):
            continue
        low, high = trained.get(f"{name}_low"), trained.get(f"{name}_high")
        interval = f"{low:.1f} to {high:.1f}" if low is not None and high is not None else ""
        compared = [subjects[other].get(name) for other in others]
        lines.append([f"`{name}`", _number(value), interval, *("" if v is None else _number(v) for v in compared)])
    if not lines:
        return "Not evaluated."
    header = ["", "this encoder", "95 % interval", *others]
    table = [header, ["---"] * len(header), *lines]
    assert evaluation is not None
    sizes = [
        f"{evaluation[key]:,} {words}"
        for key, words in (("train_images", "train images"), ("val_images", "val images"), ("classes", "classes"))
        if evaluation.get(key)
    ]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    of = f" ({', '.join(sizes)})" if sizes else ""
    return f"On frozen features{of}; accuracies in %.\n\n{text}"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _recipe(trained: Recipe) -> str:
    settings: dict[str, Any] = {}
    for key, value in values_of(trained).items():
        if BEHAVIOURS[key].in_card:
            section, _, name = key.rpartition(".")
            # Places on the machine where it was made are shown without their folders.
            shown = Path(value).name if BEHAVIOURS[key].place and isinstance(value, str) else value
            settings.setdefault(section, {})[name] = shown
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
