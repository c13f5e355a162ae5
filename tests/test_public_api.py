"""The names that programs and notebooks import: what is offered, how it is called, and what importing it costs."""

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
import wavemim
from pipeline.workers.harness import Harness

ROOT = Path(__file__).parents[1]
# Programs of others call these so: a name or an argument may be added, but none goes without a deprecation.
WAVEMIM = {
    "ImageEncoder": ["model", "image_size", "mean", "std", "value_range", "source"],
    "load_encoder": ["run"],
    "register_target": ["name"],
}
PIPELINE = {
    "Batch": ["rows", "weight", "total", "levels", "labels", "crop", "pixels"],
    "Reader": ["shards", "split", "batch", "rank", "world", "seed", "window", "flip"],
    "Recipe": ["name", "images", "out", "shards", "seed"],
    "SettingError": [],
    "ShardError": [],
    "ShardSet": ["folder", "manifest", "layout"],
    "build_inputs": ["shards", "trained", "depth"],
    "build_model": ["recipe", "shards", "start"],
    "build_views": ["recipe", "model", "inputs", "augment"],
    "load_recipe": ["recipe", "overrides", "data_only"],
    "read_batches": ["shards", "split", "batch", "window", "max_rows", "finest", "pixels"],
    "train": ["recipe", "shards", "device", "threads", "resume", "on_log", "on_checkpoint"],
    "with_overrides": ["recipe", "overrides"],
}


@pytest.mark.parametrize(
    ("package", "offered"), [(wavemim, WAVEMIM), (pipeline, PIPELINE)], ids=["wavemim", "pipeline"]
)
def test_public_names_and_their_arguments(package, offered):
    assert sorted(set(package.__all__) - {"__version__"}) == sorted(offered)
    assert set(offered) <= set(dir(package))
    for name, arguments in offered.items():
        found = getattr(package, name)
        assert found.__doc__, name
        if arguments:
            taken = set(inspect.signature(found).parameters)
            if "options" in taken:  # the fields of Harness
                taken |= {field.name for field in dataclasses.fields(Harness)}
            assert set(arguments) <= taken, name
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'load_model'"):
        _ = package.load_model


def test_the_training_loop_takes_these_options():
    from pipeline.workers.harness import Harness

    assert {"device", "threads", "resume", "on_log", "on_checkpoint"} <= set(inspect.signature(Harness).parameters)


def test_shard_sets_and_encoders_offer_what_is_documented():
    from pipeline import ShardSet
    from wavemim import ImageEncoder

    assert list(inspect.signature(ShardSet.open).parameters) == ["where", "check_files"]
    for name in ("rows", "classes", "image_size", "channels", "levels", "steps", "url", "fingerprint", "statistics"):
        assert hasattr(ShardSet, name), name
    assert list(inspect.signature(ImageEncoder.features).parameters) == ["self", "images", "batch"]
    assert list(inspect.signature(ImageEncoder.preprocess).parameters) == ["self", "images"]


def test_importing_is_light_and_training_needs_no_ray():
    code = """
import sys
heavy = lambda: sorted({"torch", "timm", "ray", "mlflow", "pyarrow"} & set(sys.modules))
import wavemim, pipeline
from wavemim import register_target
from pipeline import load_recipe, SettingError
load_recipe("small")
try:
    load_recipe("small", ["target.kind=hogs"])
except SettingError as error:
    print("hogs" in str(error), *heavy())
from wavemim import *
from pipeline import *
print(*heavy())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == ["True", "pyarrow timm torch"]
