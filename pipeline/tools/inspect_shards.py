"""`wavemim inspect`: describe the contents of a finished shard set. No Ray in here.

Only footers and narrow columns of the shards are read, a file at a time, and only numbers are kept per row: a million
rows take 60 MB, or 120 MB if nearly all are duplicates. The picture reads one row group for each of its images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pywt
from tqdm import tqdm

from pipeline.runtime.stage_folder import write_json
from pipeline.shards.errors import ShardError
from pipeline.shards.layout import DIGEST_BYTES
from pipeline.shards.row_groups import read_columns, read_group
from pipeline.shards.shard_set import SPLITS, ShardSet
from pipeline.shards.verify import label_problem, opened, read_rows, rejected_rows
from pipeline.tools.arguments import Output, check_output
from wavemim.wavelets import bands_of, reconstruct

EXAMPLES = 3


@click.command("inspect")
@click.argument("shards")
@click.option(
    "--picture", default="inspect.png", show_default=True, type=Output(), metavar="FILE.png", help="the picture"
)
@click.option("--images", default=4, show_default=True, type=click.IntRange(1, 8), help="images in the picture")
@click.option("--json", "numbers", type=Output(), metavar="FILE", help="write the numbers there too")
@click.option("--quiet", "-q", is_flag=True, help="no progress bar")
def command(shards: str, picture: str, images: int, numbers: str | None, quiet: bool) -> None:
    """Describe a shard set (folder or URL): classes, bytes, statistics, rejects, duplicates; and draw some images."""
    show(shards, picture=picture, images=images, numbers=numbers, progress=not quiet)


def inspect(where: str, *, progress: bool = True) -> tuple[ShardSet, dict[str, Any]]:
    """Read what describes a shard set.

    Args:
        where: Its folder or URL.
        progress: Whether a progress bar is shown.

    Returns:
        The shard set, and the facts about it as JSON values.

    Raises:
        SettingError: There is no such folder.
        ShardError: There is no shard set, or it is damaged.
    """
    shards = opened(where, check_files=True)
    manifest = shards.manifest
    labels = {split: np.zeros(len(shards.classes or ()) + 1, np.int64) for split in SPLITS}  # [0]: unlabelled
    digests = np.empty((sum(shards.rows.values()), DIGEST_BYTES // 8), np.uint64)
    columns: dict[str, list[int]] = {}
    place = 0
    with tqdm(total=len(digests), unit="image", desc="inspect", disable=not progress) as bar:
        for split in SPLITS:
            for name, rows in shards.files(split):
                footer, table = read_rows(shards, name, ["label", "pixels"])
                found = table.column("label").to_numpy()
                problem = label_problem(shards, found)
                if problem or len(found) != rows:
                    raise ShardError(f"{shards.folder.shown(name)} {problem or f'has {len(found)} rows, not {rows}'}")
                labels[split] += np.bincount(found + 1, minlength=len(labels[split]))
                digests[place : place + rows] = _digests(table)
                _add_sizes(columns, footer)
                place += rows
                bar.update(rows)
    return shards, {
        "where": shards.url,
        **{key: manifest[key] for key in ("fingerprint", "format", "image_size", "channels", "wavelet", "counts")},
        "parts": list(shards.parts),
        "rows": shards.rows,
        "classes": _classes(shards.classes, labels),
        "levels": manifest["levels"],
        "bytes": _bytes(shards, columns),
        "statistics": manifest["statistics"]["levels"],
        "pixels": manifest["statistics"]["pixels"],
        "energy": energy_shares(shards),
        "energy_of": f"the variance of {'the pixels' if pywt.Wavelet(manifest['wavelet']).orthogonal else 'all bands'}",
        "rejected": _reasons(rejected_rows(shards.folder)),
        "duplicates": _duplicates(shards, digests),
    }


def _digests(table: pa.Table) -> np.ndarray:
    """Column `pixels` as (n, 2) uint64."""
    column = table.column("pixels").chunk(0)
    words = np.frombuffer(column.buffers()[1], np.uint64).reshape(-1, DIGEST_BYTES // 8)
    return words[column.offset : column.offset + len(column)]


def _add_sizes(columns: dict[str, list[int]], footer: pq.FileMetaData) -> None:
    """Add a file's compressed and uncompressed bytes of every column."""
    for group in range(footer.num_row_groups):
        for index in range(footer.num_columns):
            chunk = footer.row_group(group).column(index)
            sizes = columns.setdefault(chunk.path_in_schema, [0, 0])
            sizes[0] += chunk.total_compressed_size
            sizes[1] += chunk.total_uncompressed_size


def _bytes(shards: ShardSet, columns: dict[str, list[int]]) -> dict[str, Any]:
    images, stored = sum(shards.rows.values()), sum(entry["bytes"] for entry in shards.entries())
    by_column = {
        name: {"compressed": small, "uncompressed": large, "per_image": small / images, "share": small / stored}
        for name, (small, large) in columns.items()
    }
    return {"shards": stored, "files": len(shards.entries()), "per_image": stored / images, "columns": by_column}


def _classes(names: list[str] | None, labels: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Smallest and largest class of every split, and unlabelled rows; None for a set without classes."""
    if not names:
        return None
    found: dict[str, Any] = {"count": len(names), "unlabelled": {s: int(counts[0]) for s, counts in labels.items()}}
    for which, index in (("smallest", np.argmin), ("largest", np.argmax)):
        found[which] = {}
        for split, counts in labels.items():
            label = int(index(counts[1:]))
            found[which][split] = {"name": names[label], "rows": int(counts[1 + label])}
    return found


def energy_shares(shards: ShardSet) -> dict[str, float]:
    """Share of the variance in the coarsest A ("level 5 A") and in the details of each level ("level 5", …).

    For orthogonal wavelets these are shares of the variance of the pixels; for others, of the sum over all bands.
    """
    energies = {}
    for level in range(shards.levels, 0, -1):
        found = shards.statistics[level]
        if level == shards.levels:
            energies[f"level {level} A"] = float(np.square(found["A"]["std"]).sum()) / 4**level
        squares = sum(np.square(found[band][part]).sum() for band in "HVD" for part in ("mean", "std"))
        energies[f"level {level}"] = float(squares) / 4**level  # a level has 1/4^level cells a pixel
    total = sum(energies.values())
    return {name: energy / total if total else 0.0 for name, energy in energies.items()}


def _reasons(rejected: pa.Table) -> list[dict[str, Any]]:
    """Rejects by reason, the most frequent first; details in brackets differ from file to file."""
    kind = pc.replace_substring_regex(rejected.column("reason"), r"(?s) \(.*", "")
    grouped = rejected.append_column("kind", kind).group_by("kind", use_threads=False)  # threads have no order
    rows = grouped.aggregate([("path", "count"), ("path", "first"), ("reason", "first")]).to_pylist()
    rows, shown = sorted(rows, key=lambda row: -row["path_count"]), "{path_first}: {reason_first}"
    return [{"reason": row["kind"], "count": row["path_count"], "example": shown.format(**row)} for row in rows]


def _duplicates(shards: ShardSet, digests: np.ndarray) -> dict[str, Any]:
    """Images with the same decoded pixels as an earlier one; `digests` is (n, 2), those of train first."""
    first, own = _copies(digests)  # places in that order
    leaked = (own >= shards.rows["train"]) & (first < shards.rows["train"])
    pairs: list[tuple[int, int]] = []
    for wanted in (leaked, ~leaked):  # leaks matter most; one copy of each image is enough
        chosen = np.unique(first[wanted], return_index=True)[1][: EXAMPLES - len(pairs)]
        pairs += zip(first[wanted][chosen].tolist(), own[wanted][chosen].tolist(), strict=True)
    return {
        "distinct": len(digests) - len(own),
        "copies": len(own),
        "val_in_train": int(leaked.sum()),
        "examples": [[_path(shards, place) for place in pair] for pair in pairs],
    }


def _copies(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every row that is a copy of an earlier one: places (n,) of that first one, and of the copy."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in their order
    same = np.zeros(len(order), bool)
    same[1:] = (digests[order[1:]] == digests[order[:-1]]).all(1)
    starts, copies = np.flatnonzero(~same), np.flatnonzero(same)
    return order[starts[np.searchsorted(starts, copies) - 1]], order[copies]


def _located(shards: ShardSet, place: int) -> tuple[str, str, int, int]:
    """Split, file, row group and row in the group, by the place of a row in the order of splits and files."""
    for split in SPLITS:
        for name, rows in shards.files(split):
            if place < rows:
                return split, name, *divmod(place, shards.rows_per_group)
            place -= rows
    raise AssertionError(place)


def _path(shards: ShardSet, place: int) -> str:
    split, name, group, row = _located(shards, place)
    return f"{split}: {read_columns(shards, name, group, ['path']).column('path')[row].as_py()}"


def write_picture(shards: ShardSet, facts: dict[str, Any], path: Path, count: int) -> str:
    """Draw some images, their pyramids and the energy per level.

    Args:
        shards: The shard set.
        facts: What `inspect` returned about it.
        path: The PNG.
        count: Images in the picture, or fewer where there are not so many.

    Returns:
        A description of what is shown.
    """
    from wavemim.figures.plots import pyramid_figure, shown_channels

    images, pyramids, titles = [], [], []
    split = "train" if shards.rows["train"] else "val"  # the first rows in the order of places
    rows = shards.rows[split]
    count, levels = min(count, rows), list(shards.layout.steps)
    for number in range(count):
        _, name, group, place = _located(shards, number * rows // count)
        row, label, stored = read_group(shards, name, group, levels)
        pyramid = {level: stored[level][place] * shards.steps[level] for level in levels}
        pyramids.append(pyramid)
        images.append(reconstruct(pyramid, shards.layout.wavelet))
        named = f" · {shards.classes[label[place]]}" if shards.classes and label[place] >= 0 else ""
        titles.append(f"{split} row {row[place]}{named}")
    energies = {"energies": facts["energy"], "energy_of": facts["energy_of"]}
    pyramid_figure(path, images=images, pyramids=pyramids, titles=titles, **energies)
    return f"{count} image{'s' * (count != 1)}{shown_channels(shards.channels)[1]}"


def show(where: str, *, picture: str, images: int, numbers: str | None, progress: bool = True) -> None:
    """Print a description of a shard set and draw it.

    Args:
        where: Its folder or URL.
        picture: The picture, a PNG.
        images: Images in the picture.
        numbers: A JSON file that the facts are written to, if not None.
        progress: Whether a progress bar is shown.
    """
    check_output(Path(picture), picture=True)
    if numbers:
        check_output(Path(numbers), picture=False)
    shards, facts = inspect(where, progress=progress)
    print(describe(facts), end="\n\n")
    print(f"picture: {write_picture(shards, facts, Path(picture), images)} → {picture}")
    if numbers:
        write_json(Path(numbers), facts)
        print(f"numbers: → {numbers}")


def describe(facts: dict[str, Any]) -> str:
    """The facts that `inspect` returned, as aligned text."""
    side, rows, counts, size, pixels = (facts[key] for key in ("image_size", "rows", "counts", "bytes", "pixels"))
    head = [
        ("shard set", facts["where"]),
        ("fingerprint", facts["fingerprint"]),
        *([("merged of", f"{len(facts['parts']):,} sets")] if facts["parts"] else []),
        ("rows", ", ".join(f"{split} {count:,}" for split, count in rows.items())),
        *_class_lines(facts["classes"]),
        ("images", f"{side}×{side} px, {facts['channels']} channel{'s' * (facts['channels'] != 1)}"),
        ("wavelet", f"{facts['wavelet']}, {len(facts['levels'])} levels"),
        ("pixels", f"mean {_numbers(pixels['mean'])}, std {_numbers(pixels['std'])}"),
        ("bytes", f"{size['shards']:,} in {size['files']:,} shards, {size['per_image']:,.0f} per image"),
        ("inputs", f"{counts['inputs']:,}: {counts['kept']:,} kept, {counts['rejected']:,} rejected"),
    ]
    return "\n".join([_aligned(head, "<<"), "", _level_table(facts), "", _band_table(facts), "", *_reject_lines(facts)])


def _class_lines(classes: dict[str, Any] | None) -> list[tuple[str, str]]:
    if classes is None:
        return [("classes", "none: the set is unlabelled")]
    lines = [("classes", f"{classes['count']:,}")]
    for split, unlabelled in classes["unlabelled"].items():
        ends = [f"{which} {{name}} ({{rows:,}})".format(**classes[which][split]) for which in ("smallest", "largest")]
        lines.append((f"  {split}", ", ".join([*ends, f"unlabelled {unlabelled:,}"])))
    return lines


def _level_table(facts: dict[str, Any]) -> str:
    """Bytes per level are those of its Parquet column; the rest is other columns, headers and footers."""
    table = [("level", "step", "dtype", "bands", "grid", "bytes per image", "of raw", "share")]
    rest = 1.0
    for level, entry in facts["levels"].items():
        column = facts["bytes"]["columns"][f"level{level}"]
        rest -= column["share"]
        of_raw = column["compressed"] / max(column["uncompressed"], 1)
        height, width = entry["shape"][-2:]
        sizes = (f"{column['per_image']:,.0f}", f"{of_raw:.0%}", f"{column['share']:.1%}")
        table.append((level, f"{entry['step']:g}", entry["dtype"], entry["bands"], f"{height}×{width}", *sizes))
    table.append(("others", "", "", "", "", f"{rest * facts['bytes']['per_image']:,.0f}", "", f"{rest:.1%}"))
    return _aligned(table, "<><<>>>>")


def _band_table(facts: dict[str, Any]) -> str:
    """Mean and standard deviation of the stored bands, per channel where there are few channels."""
    few, levels = facts["channels"] <= 4, len(facts["levels"])
    table = [("level", "band", "mean", "std", f"share of {facts['energy_of']}")]
    for level in range(levels, 0, -1):
        for band in bands_of(level, levels):
            mean, std = (facts["statistics"][str(level)][band][part] for part in ("mean", "std"))
            if not few:
                mean, std = [np.mean(mean)], [np.sqrt(np.mean(np.square(std)))]
            share = facts["energy"][f"level {level} A" if band == "A" else f"level {level}"]
            words = {"A": f"{share:.2%} (A)", "H": f"{share:.2%} (H, V, D)"}.get(band, "")
            table.append((str(level), band, _numbers(mean, 8), _numbers(std, 8), words))
    note = "" if few else f"\n(mean and std of {facts['channels']} channels together)"
    return _aligned(table, "<<>><") + note


def _reject_lines(facts: dict[str, Any]) -> list[str]:
    double = facts["duplicates"]
    lines = [f"rejected: {facts['counts']['rejected']:,}"]
    lines += [f"  {entry['count']:,} {entry['reason']}, as {entry['example']}" for entry in facts["rejected"]]
    lines += ["", "images with the same pixels:"]
    words = ("distinct images", "rows that duplicate an earlier one", "val images that are also in train")
    keys = ("distinct", "copies", "val_in_train")
    lines.append(_aligned([(f"  {double[key]:,}", text) for key, text in zip(keys, words, strict=True)], "><"))
    return lines + [f"  {first}  =  {second}" for first, second in double["examples"]]


def _numbers(values: Sequence[float], width: int = 0) -> str:
    return " ".join(f"{round(value, 2) + 0.0:{width}.2f}" for value in values)  # + 0.0: no -0.00


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Columns of equal width, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(sides))]
    lines = ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
