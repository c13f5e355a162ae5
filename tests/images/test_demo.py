import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_sources import plan_of

from pipeline.images.demo import CLASSES, MARK, draw, write_demo_images
from pipeline.images.describe import found_in


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.jpg"))
    }


def images_of(split: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((split / name).iterdir()):
            with Image.open(path) as image:
                images.append(np.asarray(image))
            labels.append(label)
    return np.stack(images), np.array(labels)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "images"
    write_demo_images(folder, train=600, val=200, progress=False)
    return folder


def test_every_file_opens_and_classes_are_balanced(demo: Path) -> None:
    for split, each in (("train", 60), ("val", 20)):
        images, labels = images_of(demo / split)
        assert images.shape[1:] == (64, 64, 3)
        assert np.bincount(labels).tolist() == [each] * len(CLASSES)
        assert sorted(entry.name for entry in (demo / split).iterdir()) == sorted(CLASSES)
    assert len(digests(demo)) == len(set(digests(demo).values())), "no image is written twice"


def test_same_seed_same_bytes_and_a_small_set_begins_a_large_one(demo: Path, tmp_path: Path) -> None:
    write_demo_images(tmp_path / "again", train=30, val=10, progress=False)
    again, whole = digests(tmp_path / "again"), digests(demo)
    assert len(again) == 40
    assert all(whole[name] == digest for name, digest in again.items())
    write_demo_images(tmp_path / "other", train=30, val=10, seed=1, progress=False)
    assert not set(digests(tmp_path / "other").values()) & set(again.values())


def test_colour_statistics_do_not_give_the_class_away(demo: Path) -> None:
    (train, train_labels), (val, val_labels) = images_of(demo / "train"), images_of(demo / "val")
    for statistics in (lambda x: x.mean((1, 2)), lambda x: np.concatenate([x.mean((1, 2)), x.std((1, 2))], 1)):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        accuracy = probe.fit(statistics(train), train_labels).score(statistics(val), val_labels)
        # chance is 0.1; 200 images have a standard error of 0.021
        assert accuracy < 0.2


def test_textures_differ_inside_a_shape() -> None:
    # Stripes vary along one direction only: their Fourier energy is in fewer places than that of checks.
    def share_of_strongest(label: int) -> float:
        shares = []
        for index in range(40):
            grey = draw(label, 64, np.random.default_rng([7, index])).mean(-1)
            energy = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
            ring = np.hypot(*np.meshgrid(*[np.fft.fftfreq(64)] * 2))
            middle = np.where((ring > 1 / 16) & (ring < 1 / 5), energy, 0).ravel()
            shares.append(np.sort(middle)[-4:].sum() / middle.sum())
        return float(np.mean(shares))

    stripes, checks = CLASSES.index("disc-stripes"), CLASSES.index("disc-checks")
    assert share_of_strongest(stripes) > share_of_strongest(checks) + 0.05


def test_a_whole_set_is_left_alone_and_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    first = write_demo_images(folder, train=10, val=10, progress=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_demo_images(folder, train=10, val=10, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ValueError, match="does not hold these demo images"):
        write_demo_images(folder, train=20, val=10, progress=False)
    (folder / MARK).rename(folder / "demo-images.json")  # as it was called before
    assert write_demo_images(folder, train=10, val=10, progress=False) == first
    (folder / "demo-images.json").unlink()
    with pytest.raises(ValueError, match="does not hold these demo images"):
        write_demo_images(folder, train=10, val=10, progress=False)


def test_of_the_files_beside_the_images_only_those_of_the_user_are_reported(tmp_path: Path) -> None:
    write_demo_images(tmp_path / "images", train=10, val=10, progress=False)
    assert "left out" not in found_in(plan_of(tmp_path / "images"))
    (tmp_path / "images" / "notes.json").write_text("{}")
    assert found_in(plan_of(tmp_path / "images")).endswith("; left out: 1 .json file")


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def fail_at_fifth(*arguments: object) -> np.ndarray:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return np.zeros((64, 64, 3), np.uint8)

    monkeypatch.setattr("pipeline.images.demo.draw", fail_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        write_demo_images(tmp_path / "images", train=10, val=10, progress=False)
    assert list(tmp_path.iterdir()) == []
