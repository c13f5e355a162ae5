"""The sentence on what was found, and `wavemim prepare --dry-run`."""

from pathlib import Path

from click.testing import CliRunner
from tiny_sources import plan_of, touch

from pipeline.cli import _stage_command
from pipeline.images.describe import found_in, without_images, without_val


def test_one_sentence_says_what_was_found(tmp_path):
    paths = [*(f"train/a/{i}.jpg" for i in range(5)), "train/b/0.jpg", "train/b/1.jpg", "val/a/0.jpg", "extra/0.jpg"]
    plan = plan_of(touch(tmp_path, *paths, "train/a/x.txt", "train/a/y.txt"))
    assert found_in(plan) == (
        "train/ and val/; 2 classes; 2 images of train in the smallest (b); left out: 2 .txt files, "
        "1 image in extra/ (outside of the splits)"
    )
    assert without_val(plan) == ["50% of the classes have no image in val: b"]
    assert without_images(plan, [("train/b/0.jpg", "damaged")]) == []
    lost = [("train/b/0.jpg", "damaged"), ("train/b/1.jpg", "damaged"), ("val/a/0.jpg", "damaged")]
    assert without_images(plan, lost) == [
        "every image of b in train is rejected",
        "every image of a in val is rejected",
    ]


def test_names_with_line_breaks_stay_in_one_line(tmp_path):
    plan = plan_of(touch(tmp_path, "a\nb/0.jpg", "a\nb/1.jpg", "c/0.jpg", "c/1.jpg", "c/2.jpg"), val_share=0)
    assert "(a\\nb)" in found_in(plan) and "\n" not in found_in(plan)


def test_a_dry_run_says_it_and_writes_nothing(tmp_path, monkeypatch):
    """Fails where the dry run decodes (the files are no images), writes, or hides a warning."""
    touch(tmp_path / "in", "images/0.jpg", "images/1.jpg", "masks/0.png", "masks/1.png")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(_stage_command("prepare"), ["--dry-run", "images=in", "out=o"], catch_exceptions=False)
    assert done.exit_code == 0
    assert (
        "1 images for train and 1 for val (one folder (images/), val held out; unlabelled; left out: 2 images"
        in done.output
    )
    assert [path.name for path in Path().iterdir()] == ["in"]
