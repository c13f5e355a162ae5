"""Small sources of images of every kind, and what a plan of them has to be."""

import io
import json
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiny_shards import smooth_texture

from pipeline.images.plan import ImagePlan
from pipeline.images.sources import check_source, fetch, plan_source
from pipeline.storage.folder import Folder

CLASSES = ("bark", "moss", "sand")


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Real JPEGs, each another one."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        file = io.BytesIO()
        smooth_texture(generator, 24, 20).save(file, "JPEG", quality=80)
        found.append(file.getvalue())
    return found


def plan_of(images, *, val_share: float = 0.25, seed: int = 0, **columns) -> ImagePlan:
    check_source(str(images))
    return plan_source(str(images), val_share=val_share, seed=seed, **columns)


def counts(plan: ImagePlan) -> dict[str, int]:
    return {name: len(split) for name, split in plan.splits.items()}


def labels(plan: ImagePlan) -> dict[str, str | None]:
    """path → class name."""
    rows = [row for split in plan.splits.values() for row in split.slice().to_pylist()]
    return {row["path"]: plan.classes[row["label"]] if plan.classes else None for row in rows}


def fetched(plan: ImagePlan) -> dict[str, bytes | str]:
    """path → content, by a copy of the origin as another process would have it."""
    origin = pickle.loads(pickle.dumps(plan.origin))  # noqa: S301
    found: dict[str, bytes | str] = {}
    for split in plan.splits.values():
        first, again = list(fetch(origin, split.slice())), list(fetch(origin, split.slice()))
        assert first == again and sorted(index for index, _ in first) == list(range(len(split)))
        found |= {split["path"][index].as_py(): content for index, content in first}
    return found


def check_plan(plan: ImagePlan, inputs: int) -> None:
    """What holds for every plan."""
    paths = [path for split in plan.splits.values() for path in split["path"].to_pylist()]
    assert plan.inputs == inputs == len(paths) + len(plan.rejects)
    assert len({*paths, *(path for path, _ in plan.rejects)}) == inputs
    for split in plan.splits.values():
        assert split["row"].to_pylist() == list(range(len(split)))
        assert split.slice().schema.names == ["row", "path", "label", "container", "first", "second"]
    assert all("\n" not in reason for _, reason in plan.rejects)


# The sources, each written by a function that gives back what has to come out: path → (bytes, class)


def write_tree(folder: Folder) -> dict[str, tuple[bytes, str | None]]:
    made = {}
    for number, image in enumerate(jpegs(24)):
        path = f"{CLASSES[number % 3]}/{number:02d}.jpg"
        folder.write(path, image)
        made[path] = (image, CLASSES[number % 3])
    return made


def hf_schema(names=CLASSES) -> pa.Schema:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}})
    return pa.schema({"image": image, "label": pa.int64()}).with_metadata({"huggingface": about})


def parquet_bytes(table: pa.Table, rows_per_group: int = 5) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows_per_group)
    return sink.getvalue().to_pybytes()


def write_parquet(folder: Folder) -> dict[str, tuple[bytes, str | None]]:
    made = {}
    for part in range(2):
        images, numbers = jpegs(12, part), sorted(i % 3 for i in range(12))
        cells = [{"bytes": image, "path": None} for image in images]
        name = f"data/train-{part:05d}-of-00002.parquet"
        folder.write(name, parquet_bytes(pa.table({"image": cells, "label": numbers}, hf_schema())))
        made |= {f"{name}#{i}": (images[i], CLASSES[numbers[i]]) for i in range(12)}
    return made


def tar_bytes(members: list[tuple[str, bytes]], **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_tar(folder: Folder) -> dict[str, tuple[bytes, str | None]]:
    made = {}
    for part in range(2):
        members = []
        for number, image in enumerate(jpegs(12, part)):
            key = f"{part}/{number:04d}"
            members += [(f"{key}.json", b"{}"), (f"{key}.jpg", image), (f"{key}.cls", str(number % 3 + 9).encode())]
            made[f"set-{part:03d}.tar!{key}.jpg"] = (image, str(number % 3 + 9))
        folder.write(f"set-{part:03d}.tar", tar_bytes(members))
    return made


def write_list(folder: Folder) -> dict[str, tuple[bytes, str | None]]:
    made, lines = {}, ["label,path,other"]
    for number, image in enumerate(jpegs(24)):
        path = f"photos/{number} é, x.jpg"
        folder.write(path, image)
        lines.append(f'{CLASSES[number % 3]},"{path}",{number}')
        made[path] = (image, CLASSES[number % 3])
    random.Random(0).shuffle(lines[1:])
    folder.write("list.csv", "\n".join(lines).encode())
    return made


SOURCES: dict[str, tuple[Callable[[Folder], dict[str, tuple[bytes, str | None]]], str]] = {
    "tree": (write_tree, ""),
    "parquet": (write_parquet, ""),
    "tar": (write_tar, ""),
    "list": (write_list, "list.csv"),
    "parquet glob": (write_parquet, "data/*-of-0000[2].parquet"),
    "tar glob": (write_tar, "set-00?.tar"),
}


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def write_csv(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path
