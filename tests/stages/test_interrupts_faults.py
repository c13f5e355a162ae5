"""Ctrl-C and SIGTERM at moments of real stages, on a terminal and without one: a line, an exit code, and no process left.

The end is to come within 10 seconds. That limit is not asserted to the second, since other tests may keep the machine busy.
"""

import functools
import json
import signal
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from real_commands import WORKERS, Interrupted
from tiny_finetune import coloured_set, recipe_for

from pipeline.config.load import with_overrides
from pipeline.runtime import interrupts
from wavemim.weights import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(900)]

LIMIT = 10 + 5  # seconds
TINY = {
    **{"encoder.width": 32, "encoder.depth": 2, "encoder.heads": 2, "decoder.width": 16, "decoder.heads": 2},
    **{"target.taps": {3: 1, 4: 2}, "train.batch": 16, "train.workers": 1, "train.checkpoint_every": 2},
    **{"train.log_every": 5, "tracking.system_metrics": False, "tune.epochs": 200, "tune.trials": 2},
    **{"finetune.epochs": 2000, "train.hang_timeout": 10},
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photo_folder):
    """Shards, pairs of images and masks, and recipe files: `long` trains for ever, `quick` for an epoch."""
    root = tmp_path_factory.mktemp("interrupts")
    recipe = recipe_for(coloured_set(root / "set"), root)
    for name, epochs in (("long", 5000), ("quick", 1)):
        changes = {**TINY, "name": name, "train.epochs": epochs, "train.warmup_epochs": 0}
        if name == "quick":
            changes |= {"shards": None, "checkpoint": None, "images": str(photo_folder), "data.rows_per_shard": 32}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(with_overrides(recipe, changes).dump()))
    for split in ("train", "val"):
        for number, photo in enumerate(sorted(photo_folder.rglob("*.jpg"))[:40]):
            for kind in ("images", "masks"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            with Image.open(photo) as image:
                image.save(root / "images" / split / f"{number}.png")
                image.convert("L").point(lambda value: value > 128).save(root / "masks" / split / f"{number}.png")
    return root


def interrupted(command, moment, number=signal.SIGINT, twice=False):
    """What the command says after it was interrupted at a moment."""
    command.wait(moment)
    since = command.interrupt(number)
    if twice:
        time.sleep(2 * interrupts.TOGETHER)
        since = command.interrupt(number)
    code, text, seconds = command.end(since)
    print(f"{seconds:.1f} s, {code}: {text.strip().splitlines()[-1]}")  # with pytest -s: how long it takes
    assert code == CODES[number], text
    assert seconds < LIMIT, text
    assert "Traceback" not in text and text.count("wavemim: ") == 1, text
    return text.strip().splitlines()[-1]


def now(_):
    return True


def runs(name):
    """Whether a process of this name belongs to the command."""
    return lambda children: any(child.name().startswith(name) for child in children)


def importing(command):
    """While it loads the first of its libraries: later it may have ended, on an idle machine."""
    maps, libraries = Path(f"/proc/{command.pid}/maps"), ("numpy", "pydantic_core", "arrow")
    # Before it is the command, it is a copy of this process, which has loaded them and handles signals in its own way.
    return lambda _: "pipeline.cli" in command.process.cmdline() and any(name in maps.read_text() for name in libraries)


def there(folder, pattern):
    return lambda _: any(folder.glob(pattern))


def test_prepare_before_and_while_ray_starts_and_while_it_works(folder, photo_folder):
    recipe = ("-r", folder / "quick.yaml", f"out={folder}/prepared")
    command = Interrupted("prepare", *recipe)
    line = interrupted(command, importing(command))  # not after a time: a fast machine is further by then
    assert line == "wavemim: interrupted; nothing was begun"
    left = "during prepare; finished shards are kept, and the same command makes the others"
    line = interrupted(Interrupted("prepare", *recipe), runs("raylet"))
    assert line == f"wavemim: interrupted {left}"
    works = there(folder, "prepared/shards/units/*.json")
    line = interrupted(Interrupted("prepare", "-q", *recipe, terminal=False), works, signal.SIGTERM)
    assert line == f"wavemim: terminated by SIGTERM {left}"


def test_pretrain_saves_a_checkpoint_unless_it_is_to_end_at_once(folder):
    stage, recipe = folder / "out/runs/long/pretrain", ("-r", folder / "long.yaml")
    left = "during pretrain; its checkpoints are kept, and the same command resumes from the last one"
    line = interrupted(Interrupted("pretrain", *recipe), runs(WORKERS))
    assert line == f"wavemim: interrupted {left}" and not checkpoint.seen(stage)
    for number in CODES:
        reached = checkpoint.seen(stage)[0][0] if checkpoint.seen(stage) else 0
        command = Interrupted("pretrain", *recipe, "train.checkpoint_every=100000", terminal=number == signal.SIGINT)
        command.wait(functools.partial(trained, stage, reached))
        line = interrupted(command, now, number)
        assert line.endswith(left)
        assert checkpoint.seen(stage)[0][0] >= images_logged(stage) > reached  # of the moment: no other was due
    command = Interrupted("pretrain", *recipe)
    command.wait(functools.partial(trained, stage, checkpoint.seen(stage)[0][0]))
    assert interrupted(command, now, twice=True) == f"wavemim: interrupted {left}"
    assert not (stage / "result.json").exists()


def images_logged(stage):
    lines = (stage / "metrics.jsonl").read_text().splitlines() if (stage / "metrics.jsonl").exists() else []
    return max([json.loads(line)["step"] for line in lines if "train/loss" in line], default=0)


def trained(stage, reached, _):
    """Whether workers have logged more images than a checkpoint has, and reported their steps to the driver."""
    reports = [json.loads(path.read_bytes())["steps"] for path in (stage / ".beats").glob("rank*.json")]
    return images_logged(stage) > reached + 100 and any(reports)


def test_run_ends_in_whatever_stage_it_is_and_goes_on_there(folder):
    recipe, out = ("-r", folder / "quick.yaml", f"out={folder}/run"), folder / "run/runs/quick"
    line = interrupted(Interrupted("run", *recipe), there(out, "evaluate/settings.json"))
    again = "nothing of it is kept, and the same command begins it again"
    assert line == f"wavemim: interrupted during evaluate; the stages before it are kept; {again}"
    assert (out / "pretrain/result.json").exists() and not (out / "evaluate/result.json").exists()
    command = Interrupted("run", *recipe, terminal=False)
    line = interrupted(command, there(out, "tune/trials/*/metrics.jsonl"), signal.SIGTERM)
    kept = "finished trials are kept, and the same command runs the others"
    assert line == f"wavemim: terminated by SIGTERM during tune; the stages before it are kept; {kept}"
    assert (out / "evaluate/result.json").exists() and not (out / "tune/result.json").exists()


def test_finetune_segment_and_embed(folder, photo_folder):
    out, recipe = folder / "out/runs/long", ("-r", folder / "long.yaml")
    line = interrupted(Interrupted("finetune", *recipe), there(out, "finetune/images-*"))
    kept = "its checkpoints are kept, and the same command resumes from the last one"
    assert line == f"wavemim: interrupted during finetune; {kept}"

    places = (f"segment.images={folder}/images", f"segment.masks={folder}/masks", "segment.steps=200000")
    line = interrupted(Interrupted("segment", *recipe, *places), there(out, "segment/.tokens/*"))
    again = "nothing of it is kept, and the same command begins it again"
    assert line == f"wavemim: interrupted during segment; {again}"
    assert not (out / "segment/.tokens").exists()

    target = folder / "features"
    target.mkdir()
    command = Interrupted("embed", folder / "encoder", *[photo_folder] * 200, "--out", target / "f.parquet")
    assert interrupted(command, there(target, ".*features*")).startswith("wavemim: interrupted during embed; no feat")
    assert not list(target.iterdir())


@pytest.mark.parametrize("tool", ["verify", "inspect", "compare", "sync", "show"])
def test_tools_without_ray(folder, photo_folder, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `inspect` would leave its picture, if it was not interrupted in time
    photo = next(photo_folder.rglob("*.jpg"))
    places = {"verify": [folder / "set"], "inspect": [folder / "set"], "show": [folder / "out/runs/long", photo]}
    command = Interrupted(tool, *places.get(tool, [folder / "out"]), terminal=tool != "sync")
    assert interrupted(command, importing(command)).startswith("wavemim: interrupted")
