"""Records the losses and final weights of short runs on the CPU, for ``tests/test_loss_equality.py``.

    python tests/loss_equality/record.py              # run all cases, say what changed, write recorded.json
    python tests/loss_equality/record.py --dry-run    # the same without writing
    python tests/loss_equality/record.py small "two workers, DDP"    # these cases alone

Record again only where numbers are meant to change, and say why in the commit: the file is what a refactoring is held to.

The runs are made in a process of their own, whose environment makes their bits independent of the type of the CPU: one
thread, ATen's and MKL's kernels for every x86-64, no oneDNN (off in ``runs.py``). On one machine these give the same bits
with and without the AVX, AVX2, FMA and AVX-512 variants of glibc, OpenBLAS and numpy, and take no longer at this size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDED = HERE / "recorded.json"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE.parent}",
}


def measured(names: Sequence[str] = ()) -> dict[str, Any]:
    """What the code of this checkout gives: fingerprint, recipes, cases and, without `names`, the probe."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, str(HERE / "runs.py"), str(file), *names]
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the runs failed:\n{done.stdout}{done.stderr}")
        return dict(json.loads(file.read_text()))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CASE", help="cases to run; none: all")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args()
    old = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {"fingerprint": {}, "cases": {}}
    found = measured(options.names)
    if missing := [name for name in options.names if name not in found["cases"]]:
        raise SystemExit(f"no such case: {', '.join(missing)}")
    cases = {name: case for name, case in found["cases"].items() if not options.names or name in options.names}
    for key, value in found["fingerprint"].items():
        if old["fingerprint"].get(key) != value:
            print(f"recorded with other {key}: {old['fingerprint'].get(key)} → {value}")
    for name in sorted({*cases, *(() if options.names else old["cases"])}):
        if old["cases"].get(name) != cases.get(name):
            state = "new" if name not in old["cases"] else "changed" if name in cases else "gone"
            print(f"{state}: {name}")
    same = sum(old["cases"].get(name) == case for name, case in cases.items())
    print(f"{same} of {len(cases)} cases are as recorded, bit for bit")
    if options.dry_run:
        return 0
    if options.names and old["fingerprint"] != found["fingerprint"]:
        raise SystemExit("not written: cases of two kinds of machines do not go into one file; record all of them")
    content = {"fingerprint": found["fingerprint"], "cases": {**(old["cases"] if options.names else {}), **cases}}
    RECORDED.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {RECORDED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
