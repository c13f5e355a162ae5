"""How data sets of the field are laid out in folders, and what is made of each."""

import unicodedata

import pytest
from tiny_sources import check_plan, counts, labels, plan_of, touch

from pipeline.errors import SettingError
from pipeline.images.names import is_annotation, split_of


def some(folder: str, count: int = 2, suffix: str = ".jpg") -> list[str]:
    return [f"{folder}/{number}{suffix}" for number in range(count)]


LABELLED, FLAT = [*some("{}/cat"), *some("{}/dog")], some("{}")


def split(paths: list[str], *names: str) -> list[str]:
    return [path.format(name) for name in names for path in paths]


# paths, images of train and val, classes, kinds that are left out
LAYOUTS = {
    "ImageNet": (split(LABELLED, "train", "val"), (4, 4), ["cat", "dog"], []),
    "a test split without labels": (split(LABELLED, "train") + some("test"), (4, 0), ["cat", "dog"], ["test/"]),
    "a third split": (split(LABELLED, "train", "val") + some("test"), (4, 4), ["cat", "dog"], ["test/"]),
    "COCO": (
        [*split(FLAT, "train2017", "val2017", "test2017"), "annotations/instances_val2017.json"],
        (2, 2),
        None,
        ["test2017/", ".json files"],
    ),
    "CycleGAN": (split(FLAT, "trainA", "trainB", "testA", "testB"), (4, 4), None, []),
    "DIV2K": (
        split(FLAT, "DIV2K_train_HR", "DIV2K_valid_HR", "DIV2K_train_LR_bicubic/X2"),
        (2, 2),
        None,
        ["DIV2K_train_LR_bicubic/"],
    ),
    "Kaggle": ([*split(FLAT, "train_images", "test_images"), "train.csv"], (2, 2), None, [".csv files"]),
    "ADE20K": (
        [*split(FLAT, "images/training", "images/validation"), *some("annotations/training", suffix=".png")],
        (2, 2),
        None,
        ["annotations/"],
    ),
    "VOC": (
        [
            *some("VOC2012/JPEGImages"),
            *some("VOC2012/SegmentationClass", suffix=".png"),
            *some("VOC2012/SegmentationObject", suffix=".png"),
            "VOC2012/Annotations/0.xml",
        ],
        (2, 0),
        None,
        ["SegmentationClass/", "SegmentationObject/", ".xml files"],
    ),
    "CamVid": (
        [*split(FLAT, "train", "val"), *some("trainannot", suffix=".png"), *some("valannot", suffix=".png")],
        (2, 2),
        None,
        ["trainannot/", "valannot/"],
    ),
    "Carvana": ([*split(FLAT, "train", "test"), *some("train_masks", suffix=".gif")], (2, 2), None, ["train_masks/"]),
    "YOLO": (
        [*split(FLAT, "images/train", "images/val"), "labels/train/0.txt", "labels/val/0.txt", "data.yaml"],
        (2, 2),
        None,
        [".txt files", ".yaml files"],
    ),
    "Roboflow": ([*split(FLAT, "train/images", "valid/images"), "train/labels/0.txt"], (2, 2), None, [".txt files"]),
    "Medical Segmentation Decathlon": (
        [*split(FLAT, "imagesTr", "imagesTs"), *some("labelsTr", suffix=".png")],
        (2, 2),
        None,
        ["labelsTr/"],
    ),
    "an archive's own folder": (
        [*split(LABELLED, "set-1.0/train", "set-1.0/val"), "README.md", "meta.csv"],
        (4, 4),
        ["cat", "dog"],
        [".md files", ".csv files"],
    ),
    "classes in an archive's own folder": (
        [*split(LABELLED, "flowers"), "LICENSE"],
        (4, 0),
        ["cat", "dog"],
        ["files without a suffix"],
    ),
    "files of systems": (
        [*split(LABELLED, "."), *split(LABELLED, "__MACOSX", "@eaDir", ".ipynb_checkpoints"), "cat/Thumbs.db"],
        (4, 0),
        ["cat", "dog"],
        ["files of the system"],
    ),
    "nested class folders": (["a/0.jpg", "a/New folder/1.jpg", "b/x/y/0.jpg"], (3, 0), ["a", "b"], []),
    "images and masks": ([*some("images"), *some("masks", suffix=".png")], (2, 0), None, ["masks/"]),
    "masks of unknown images": ([*some("tiles"), *some("mask", suffix=".png")], (2, 0), None, ["mask/"]),
    "masks in class folders": (
        ["benign/a (1).png", "benign/a (1)_mask.png", "benign/a (1)_mask_1.png", "normal/a (1).png"],
        (2, 0),
        ["benign", "normal"],
        ["masks beside images"],
    ),
    "masks of the same name": (
        ["0.jpg", "0.png", "1.jpg", "1.png"],
        (2, 0),
        None,
        ["masks beside images"],
    ),
    "classes named like annotations": (
        [*some("with_mask"), *some("without_mask")],
        (4, 0),
        ["with_mask", "without_mask"],
        [],
    ),
    "splits named by what they hold": (
        split(LABELLED, "seg_train/seg_train", "seg_test/seg_test") + some("seg_pred/seg_pred"),
        (4, 4),
        ["cat", "dog"],
        ["seg_pred/"],
    ),
    "parts of a set": ([*some("HAM10000_images_part_1"), *some("HAM10000_images_part_2")], (4, 0), None, []),
    "labels as a class": ([*some("labels"), *some("boxes")], (4, 0), ["boxes", "labels"], []),
    "train as a class": ([*some("bus"), *some("plane"), *some("train")], (6, 0), ["bus", "plane", "train"], []),
    "years of a set": (
        [*some("VOCdevkit/VOC2007/JPEGImages"), *some("VOCdevkit/VOC2012/JPEGImages")],
        (4, 0),
        None,
        [],
    ),
    "folds": ([*split(LABELLED, "fold0", "fold1")], (8, 0), None, []),
    "splits in each class": (
        [*split(FLAT, "cat/train", "cat/test", "dog/train", "dog/test"), *some("dog/val")],
        (4, 4),
        ["cat", "dog"],
        ["dog/test/"],
    ),
    "splits of each resolution": (
        split(FLAT, "100k/train", "100k/val", "10k/train", "10k/val"),
        (4, 4),
        ["100k", "10k"],
        [],
    ),
    "classes in splits in folders": (
        split(LABELLED, "small/train", "small/val", "large/train", "large/val"),
        (8, 8),
        ["cat", "dog"],
        [],
    ),
    "MVTec": (
        [
            *split(
                FLAT, "bottle/train/good", "bottle/test/good", "bottle/test/broken", "nut/train/good", "nut/test/bent"
            ),
            *some("bottle/ground_truth/broken", suffix=".png"),
        ],
        (4, 6),
        ["bottle", "nut"],
        ["ground_truth/"],
    ),
    "short names of splits": (
        [*split(FLAT, "DUTS-TR/DUTS-TR-Image", "DUTS-TE/DUTS-TE-Image"), *some("DUTS-TR/DUTS-TR-Mask", suffix=".png")],
        (2, 2),
        None,
        ["DUTS-TR-Mask/"],
    ),
    "evaluation": (split(LABELLED, "training", "evaluation"), (4, 4), ["cat", "dog"], []),
    "deep in an archive": (split(FLAT, "a/b/c/d/e/f/train", "a/b/c/d/e/f/val"), (2, 2), None, []),
    "valid and invalid": (split(FLAT, "valid", "invalid"), (4, 0), ["invalid", "valid"], []),
    "mask and no mask": (
        [*some("train/mask", suffix=".png"), *some("train/no_mask", suffix=".png")],
        (4, 0),
        ["mask", "no_mask"],
        [],
    ),
    "masks of several people": (
        [*some("img"), *some("masks_human", suffix=".png"), *some("masks_machine", suffix=".png")],
        (2, 0),
        None,
        ["masks_human/", "masks_machine/"],
    ),
    "a folder for each image": (
        [f"{part}/{n}/images/{n}.png" for part, n in [*(("train", n) for n in range(4)), ("test", 8), ("test", 9)]],
        (4, 2),
        None,
        [],
    ),
    "a folder for each image of test": (
        [*split(FLAT, *(f"train/{c}" for c in "abcd")), *(f"test/{n}/0.jpg" for n in range(4))],
        (8, 0),
        ["a", "b", "c", "d"],
        ["test/"],
    ),
    "one image of each class in val": (
        [*split(FLAT, *(f"train/{c}" for c in "abcd")), *(f"val/{c}/0.jpg" for c in "abcd")],
        (8, 4),
        ["a", "b", "c", "d"],
        [],
    ),
    "other languages": (split(LABELLED, "Trainingsdaten", "Testdaten"), (4, 4), ["cat", "dog"], []),
    "short words that are no splits": (
        split(FLAT, "lang_tr", "lang_te", "lang_en"),
        (6, 0),
        ["lang_en", "lang_te", "lang_tr"],
        [],
    ),
    "labelled and not": ([*split(LABELLED, "labeled"), *some("unlabeled")], (6, 0), None, []),
    "annotated copies": ([*some("Original_Images"), *some("Annotated_Images")], (2, 0), None, ["Annotated_Images/"]),
    "a val folder without images": (
        [*split(LABELLED, "train"), "val/a/0.heif"],
        (4, 0),
        ["cat", "dog"],
        [".heif files"],
    ),
    "a split among classes": ([*split(LABELLED, "."), *some("test")], (4, 0), ["cat", "dog"], ["test/"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_field(name, tmp_path):
    """Fails where a split becomes a class, val is trained on, a mask counts as an image, or a kind is not said."""
    paths, (train, val), classes, kinds = LAYOUTS[name]
    plan = plan_of(touch(tmp_path, *paths), val_share=0)
    assert (counts(plan), plan.classes) == ({"train": train, "val": val}, classes)
    assert not plan.rejects
    left = list(plan.left_out)
    assert len(left) == len(kinds) and all(any(kind in one for one in left) for kind in kinds), left
    assert plan.ignored == sum(plan.left_out.values())
    everything = plan_of(tmp_path, val_share=None)  # as `wavemim embed` lists them: the third split too
    check_plan(everything, train + val + sum(n for kind, n in plan.left_out.items() if "split" in kind))
    if classes:
        assert labels(everything).items() >= labels(plan).items()


def test_tiny_imagenet_as_it_is_downloaded(tmp_path):
    classes = ("n01", "n02")
    touch(tmp_path, *(f"set/train/{c}/images/{c}_{i}.JPEG" for c in classes for i in range(3)))
    touch(tmp_path, *(f"set/train/{c}/{c}_boxes.txt" for c in classes), "set/test/images/test_0.JPEG", "set/wnids.txt")
    touch(tmp_path, *(f"set/val/images/val_{i}.JPEG" for i in range(4)))
    lines = [f"val_{i}.JPEG\tn0{i % 2 + 1}\t0\t0\t62\t62\n" for i in range(4)]
    (tmp_path / "set/val/val_annotations.txt").write_text("".join(lines))
    plan = plan_of(tmp_path)
    assert plan.classes == list(classes) and counts(plan) == {"train": 6, "val": 4}
    assert {path: label for path, label in labels(plan).items() if "/val/" in path} == {
        f"set/val/images/val_{i}.JPEG": classes[i % 2] for i in range(4)
    }
    assert {kind.split(" (")[0] for kind in plan.left_out} == {".txt files", "images in set/test/"}


def test_class_names_in_two_forms_of_unicode_are_one(tmp_path):
    composed, other = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    paths = [*some(f"train/{composed}"), *some(f"train/{other}"), *some("train/the"), *some(f"val/{other}")]
    plan = plan_of(touch(tmp_path, *paths))
    assert plan.classes == [composed, "the"] and counts(plan) == {"train": 6, "val": 2}
    assert set(plan.splits["val"]["label"].to_pylist()) == {0}


def test_class_names_of_a_list_are_composed_as_those_of_folders_are(tmp_path):
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    touch(tmp_path, *(f"{i}.jpg" for i in range(6)))
    labels_ = [*forms, *forms, "the", "the"]
    rows = "".join(f"{i}.jpg,{label}\n" for i, label in enumerate(labels_))
    (tmp_path / "list.csv").write_text(f"path,label\n{rows}")
    assert plan_of(tmp_path / "list.csv").classes == [forms[0], "the"]


def test_a_class_folder_without_images_is_named(tmp_path):
    touch(tmp_path, *some("a"), *some("b"), "c/notes.txt")
    (tmp_path / "d").mkdir()
    plan = plan_of(tmp_path)
    assert plan.classes == ["a", "b"] and plan.notes == ("no image in c, d: not among the classes",)


def test_no_labels_may_be_asked_for(tmp_path):
    plan = plan_of(touch(tmp_path, *split(LABELLED, "train"), *some("val")), label_column="none")
    assert plan.classes is None and counts(plan) == {"train": 4, "val": 2}


def test_val_and_test_without_train_are_no_classes(tmp_path):
    with pytest.raises(
        SettingError, match=r"test and val \(test, val\) and none for train; name the folder to train on"
    ):
        plan_of(touch(tmp_path, *some("val"), *some("test")))
    assert counts(plan_of(tmp_path, val_share=None))["train"] == 4  # to embed them, no split is needed


@pytest.mark.parametrize(
    "paths",
    [split(LABELLED, "fold_1/train", "fold_1/val", "fold_2/train", "fold_2/val"), split(FLAT, "a/train", "a/val", "b")],
    ids=["folds", "one of two folders"],
)
def test_several_divisions_into_splits_are_not_mixed(paths, tmp_path):
    """Fails where a fold's val is trained on because another fold has it in train, or val becomes part of a class."""
    with pytest.raises(
        SettingError, match=r"folders? for train and val inside; name the folder to use, as in .*/(fold_1|a)"
    ):
        plan_of(touch(tmp_path, *paths))
    assert counts(plan_of(tmp_path, val_share=None))["train"] == len(paths)


def test_an_empty_val_folder_is_said(tmp_path):
    (touch(tmp_path, *some("train", 8)) / "val" / "x").mkdir(parents=True)
    plan = plan_of(tmp_path)
    assert counts(plan) == {"train": 6, "val": 2} and plan.notes == ("no image in val/: val is held out of train",)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("train", "train"),
        ("Train-2012", "train"),
        ("testset", "test"),
        ("validation_images", "val"),
        ("train_station", None),
        ("bullet train", None),
        ("test_masks", None),
        ("training_shoes", None),
        ("ILSVRC2012_img_val", "val"),  # beside ILSVRC2012_img_train
        ("tests of time", None),
    ],
)
def test_names_of_splits(name, found):
    assert split_of(name, ["ILSVRC2012_img_train", "ILSVRC2012_img_val", "shoes"]) == found


def test_names_of_annotations():
    beside = ["road", "road_gt", "images", "damask", "no_mask", "gtFine"]
    found = [name for name in ("road_gt", "gtFine", "masks", "damask", "no_mask") if is_annotation(name, beside)]
    assert found == ["road_gt", "gtFine", "masks"]
