"""Names that the field gives to folders and files of data sets: splits, images, annotations, and files of systems.

All recognition by name is in this file. It never decides alone: `pipeline.images.tree_layout` also looks at what lies
beside a folder, since ``train`` and ``mask`` may as well be classes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

NOT_UTF8 = "file name is not valid UTF-8"  # why a file is rejected
MASK_SUFFIXES = frozenset((".png", ".tif", ".tiff", ".bmp", ".gif", ".npy"))  # masks are stored without loss
PHOTO_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".webp"))
# Names of the folders of a split, in any case; the first that exists is taken.
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "test")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


TRAIN, VAL, TEST = "train", "val", "test"
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset", "trn"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "valset", "dev", "devset", "eval", "evaluation"), VAL),
    **dict.fromkeys(("test", "testing", "testset", "tst"), TEST),
}
_SHORT_SPLITS = {"tr": TRAIN, "ts": TEST, "te": TEST, "va": VAL}  # only beside a word for images: imagesTr
_IMAGE_WORDS = _set(
    "image images img imgs im jpegimages jpeg jpegs jpg jpgs png pngs tif tiff tiffs picture pictures pic pics photo "
    "photos rgb rgbs colour color input inputs frame frames data dataset left leftimg leftimages sat source"
)
# What belongs to images without being images to train on: masks and other targets, and copies of lower resolution.
_ANNOTATION_WORDS = _set(
    "mask masks pixelmask pixelmasks pixelmap pixelmaps label labels labelid labelids labelmap labelmaps annotation "
    "annotations annot annots anno annos ann anns seg segs segmentation segmentations gt gts groundtruth truth target "
    "targets trimap trimaps matte mattes alpha alphas depth depths disparity disparities normals flow semantic "
    "instance instances panoptic stuff parsing saliency heatmap heatmaps contour contours edges boxes bbox bboxes annotated overlay overlays "
    "keypoints polygons lr lowres bicubic thumbnail thumbnails thumbs previews"
)
# These make a folder beside one that is named for images its annotations, whatever other words are in the name.
_STRONG_WORDS = _set(
    "mask masks label labels annotation annotations segmentation segmentations gt groundtruth trimaps manual"
)
# Words that say nothing beside those above.
_NEUTRAL_WORDS = _set(
    "a b x part parts set split full all hr highres raw original orig clean fine coarse class object aug map maps id ids "
    "ground color colour bw binary new final bit trainvaltest"
)
_SYSTEM_NAMES = _set(
    "__macosx @eadir #recycle $recycle.bin lost+found __pycache__ thumbs.db ehthumbs.db desktop.ini"
) | {"icon\r", "system volume information"}

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_JOINED = re.compile(f"({'|'.join(sorted(_SPLIT_WORDS, key=len, reverse=True))})([a-z]{{3,}})")
_TAIL = re.compile(r"[\s_.-]*\(?\d*\)?$")  # of the third mask of an image: x_mask_3
_MARKS = ("masks", "mask", "segmentation", "seg", "labelids", "labels", "label", "annotation", "annot", "matte", "trimap",
          "gt", "groundtruth", "depth", "superpixels")  # fmt: skip
_IMAGE_MARKS = ("images", "image", "img", "im", "sat", "rgb", "photo", "leftimg8bit", "color")
_AFTER = re.compile(rf"(.+?)[\s_.-]+(?:{'|'.join(_MARKS)})", re.IGNORECASE)
_BEFORE = re.compile(rf"(?:{'|'.join(_MARKS)})[\s_.-]+(.+)", re.IGNORECASE)
_ANY_MARK = re.compile("|".join(_MARKS), re.IGNORECASE)
_IMAGE_AFTER = re.compile(rf"(.+?)[\s_.-]+(?:{'|'.join(_IMAGE_MARKS)})", re.IGNORECASE)
_IMAGE_BEFORE = re.compile(rf"(?:{'|'.join(_IMAGE_MARKS)})[\s_.-]+(.+)", re.IGNORECASE)
_PART_WORDS = _set("part parts batch fold folds shard chunk subset split")  # beside a number
_LABELLED_WORDS = _set("labeled labelled unlabeled unlabelled images data set")
_FOLD_WORDS = _set("fold folds kfold cv split")
_DENIALS = _set("no non not with without")
_NOT = r"(in|un|im|ir|il|ab|dis|mis|non?|not|without|anti|pre|post)"
_YEAR = re.compile(r"(19|20)\d\d")
_DATE = re.compile(r"(19|20)\d\d([-_. ]?(0?[1-9]|1[0-2])([-_. ]?\d\d?)?)?")


def words_of(name: str) -> list[str]:
    """The words of a name in lower case, divided at signs, digits and capitals: "DIV2K_trainHR" → div, 2, k, train, hr."""
    words = []
    for word in _WORD.findall(name):
        low = word.lower()
        joined = _JOINED.fullmatch(low)
        known = low in _SPLIT_WORDS or low in _IMAGE_WORDS or low in _ANNOTATION_WORDS or low in _NEUTRAL_WORDS
        if joined and not known and (joined[2] in _IMAGE_WORDS or joined[2] in _ANNOTATION_WORDS):
            words += [joined[1], joined[2]]
        else:
            words.append(low)
    return words


def is_system(name: str) -> bool:
    """Whether a file or folder belongs to an operating system, an archive program or a storage device."""
    return name.casefold() in _SYSTEM_NAMES or name.startswith("._")


def is_date(name: str) -> bool:
    """Whether a folder is named by a year, a month or a day: 2021, 2021-05, 20210517."""
    return _DATE.fullmatch(name) is not None


def holds_images(name: str) -> bool:
    """Whether a folder's name says that images are in it, as those of the field do: images, JPEGImages, train_images."""
    words = words_of(name)
    return bool(set(words) & _IMAGE_WORDS) and all(_says_nothing(word) or word in _SPLIT_WORDS for word in words)


def split_of(name: str, beside: Iterable[str] = (), *, annotations: bool = False) -> str | None:
    """The split that a folder's name says: train, val, test, or None.

    Args:
        name: The name. Years, letters (trainA) and words for images may be beside the word of the split.
        beside: Names of the folders beside it. Other words are accepted where another split has the same words:
            DIV2K_train_HR beside DIV2K_valid_HR.
        annotations: Whether words for annotations may be in it: where folders of annotations are left out already, or
            are what is looked for.
    """
    found, rest = _split_and_rest(name, annotations)
    if found is None:
        return _short_split(name, beside)
    if all(_says_nothing(word) or (annotations and word in _ANNOTATION_WORDS) for word in rest):
        return found
    for other in beside:
        split, others = _split_and_rest(other, annotations)
        if split not in (None, found) and others == rest:
            return found
    return None


def split_by_beginning(name: str) -> str | None:
    """The split that a name begins with, in any language: Trainingsdaten, Testdaten."""
    return next((split for split in (TRAIN, VAL, TEST) if name.casefold().startswith(split)), None)


def is_annotation(name: str, beside: Collection[str]) -> bool:
    """Whether a folder's name says that masks, labels or other annotations are in it, not images.

    Args:
        name: The name.
        beside: Names of the folders beside it. Words of these may be in it: road_masks beside road.
    """
    words = words_of(name)
    if not set(words) & _ANNOTATION_WORDS:
        return False
    rest = {word for word in words if not (word in _ANNOTATION_WORDS or _says_nothing(word) or word in _SPLIT_WORDS)}
    rest -= _SHORT_SPLITS.keys()
    if not rest:
        return not any(is_opposite(other, name) for other in beside)  # mask beside no_mask: classes
    if (
        set(words) & _STRONG_WORDS
        and not set(words) & _DENIALS
        and any(holds_images(other) for other in beside if other != name)
    ):
        return True
    plain = (set(words_of(other)) for other in beside if other != name)
    return any(rest <= other and not other & _ANNOTATION_WORDS for other in plain)


def is_opposite(name: str, other: str) -> bool:
    """Whether a name is the opposite of another one, as class names are: invalid and valid, no_mask and mask."""
    plain, of = (re.sub(r"[\W\d_]+", "", one).casefold() for one in (name, other))
    return bool(of) and re.fullmatch(_NOT + re.escape(of), plain) is not None


def are_parts(names: Collection[str]) -> bool:
    """Whether folders are parts of one set of images by their names, not classes: images_1 and images_2, img and photos.

    So are folders that differ in a year only: VOC2007 and VOC2012.
    """
    if all(map(holds_images, names)) or all(set(words_of(name)) <= _LABELLED_WORDS for name in names):
        return True
    numberless = [[word for word in words_of(name) if not word.isdigit()] for name in names]
    if not numberless[0] or any(words != numberless[0] for words in numberless):
        return False
    return bool(set(numberless[0]) & (_IMAGE_WORDS | _PART_WORDS)) or all(map(_YEAR.search, names))


def is_fold(name: str) -> bool:
    """Whether a folder is one of several divisions of the same images: fold_1, split2."""
    return bool(set(words_of(name)) & _FOLD_WORDS)


def class_name(name: str) -> str:
    """A class name in Unicode's composed form: the same name is stored in other forms by other systems."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def masks_beside(stems: Collection[str]) -> set[str]:
    """Which stems of one folder's images name masks of other images in it: x_mask or mask_3 beside x, image_3 or x_sat.

    Args:
        stems: File names without their suffix.
    """
    marked: dict[str, str] = {}
    for stem in stems:
        if _ANY_MARK.search(stem) is None:
            continue
        found = _AFTER.fullmatch(stem) or _AFTER.fullmatch(_TAIL.sub("", stem)) or _BEFORE.fullmatch(stem)
        if found:
            marked[stem] = found[1].casefold()
    if not marked:
        return set()
    images = set()
    for stem in stems:
        if stem not in marked:
            images.add(stem.casefold())
            if found := _IMAGE_AFTER.fullmatch(stem) or _IMAGE_BEFORE.fullmatch(stem):
                images.add(found[1].casefold())
    return {stem for stem, base in marked.items() if base in images}


def _says_nothing(word: str) -> bool:
    return word.isdigit() or word in _NEUTRAL_WORDS or word in _IMAGE_WORDS


def _short_split(name: str, beside: Iterable[str]) -> str | None:
    """The split that the last word of a name says, if a name beside it differs in it alone: DUTS-TR and DUTS-TE."""
    *rest, last = words_of(name) or [""]
    if last not in _SHORT_SPLITS or not rest:
        return None
    others = [words[-1] for other in beside if (words := words_of(other)) and words[:-1] == rest and words[-1] != last]
    return _SHORT_SPLITS[last] if others and all(word in _SHORT_SPLITS for word in others) else None


def _split_and_rest(name: str, annotations: bool) -> tuple[str | None, list[str]]:
    """The split in a name, if there is just one, and the other words."""
    words = words_of(name)
    found = [word for word in words if word in _SPLIT_WORDS]
    if len(found) == 1 and (annotations or not set(words) & _ANNOTATION_WORDS):
        return _SPLIT_WORDS[found[0]], [word for word in words if word != found[0]]
    kinds = _IMAGE_WORDS | _ANNOTATION_WORDS if annotations else _IMAGE_WORDS
    if not found and len(words) == 2 and words[0] in kinds and words[1] in _SHORT_SPLITS:
        return _SHORT_SPLITS[words[1]], words[:1]
    return None, words
