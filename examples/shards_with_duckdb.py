"""SQL over a shard set with DuckDB: images per class and split, bytes per column, duplicates, and what was rejected.

Shards are plain Parquet files (pipeline/shards/FORMAT.md), so DuckDB, pandas and Spark can read them without wavemim:

    pip install duckdb
    wavemim demo out=wavemim-demo
    python examples/shards_with_duckdb.py wavemim-demo/shards
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import duckdb

QUESTIONS = {
    "Images per class and split": """
        SELECT coalesce(class, '(no label)') AS class,
               count(*) FILTER (split = 'train') AS train,
               count(*) FILTER (split = 'val') AS val
        FROM images LEFT JOIN classes USING (label)
        GROUP BY ALL ORDER BY class
    """,
    "Bytes per image of each column, as stored and uncompressed": """
        SELECT path_in_schema AS column,
               round(sum(total_compressed_size) / (SELECT count(*) FROM images), 1) AS stored,
               round(sum(total_uncompressed_size) / (SELECT count(*) FROM images), 1) AS uncompressed,
               mode(compression) AS compression
        FROM parquet_metadata($files)
        GROUP BY ALL ORDER BY stored DESC
    """,
    "Images that are stored more than once": """
        SELECT count(*) AS times, string_agg(path, ', ' ORDER BY path) AS paths
        FROM images GROUP BY pixels HAVING count(*) > 1 ORDER BY times DESC LIMIT 5
    """,
    "Inputs that were rejected, by reason": """
        SELECT split_part(reason, ' (', 1) AS reason, count(*) AS inputs, min(path) AS example
        FROM read_parquet($rejected) GROUP BY 1 ORDER BY inputs DESC
    """,
}


def main() -> None:
    """Ask each of the questions and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="a shard set, a local folder")
    folder = parser.parse_args().shards
    if not (folder / "manifest.json").is_file():
        sys.exit(f"error: {folder} is not a shard set: it has no manifest.json")

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))  # it names the files
    if manifest["format"] != 2:
        sys.exit(f"error: {folder} has format {manifest['format']}; of a merged set, give one of its parts")
    files = [str(folder / file["name"]) for split in manifest["splits"].values() for file in split["files"]]
    values = {"files": files, "rejected": str(folder / "rejected.parquet")}

    database = duckdb.connect()
    database.execute("CREATE TABLE classes (label INTEGER, class VARCHAR)")
    if manifest["classes"]:
        database.executemany("INSERT INTO classes VALUES (?, ?)", list(enumerate(manifest["classes"])))
    database.execute(
        """
        CREATE TEMP TABLE images AS
        SELECT row, path, label, pixels, split_part(parse_filename(filename), '-', 1) AS split
        FROM read_parquet($files, filename = true)
        """,
        {"files": files},
    )
    for title, question in QUESTIONS.items():
        print(title)
        asked = {name: value for name, value in values.items() if f"${name}" in question}
        database.sql(question, params=asked).show()


if __name__ == "__main__":
    main()
