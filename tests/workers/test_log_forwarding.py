"""Warnings of a worker are warnings of the command that started it, and stay in the stage's folder."""

import logging
import subprocess
import sys
import time

from pipeline.workers.log_forwarding import FILE, showing

WORKER = """
import logging, sys
from pathlib import Path
from pipeline.workers.log_forwarding import passing_on

with passing_on(Path(sys.argv[1]), 3):
    logging.getLogger("pipeline.training.pretrain_loop").warning("step %d: the loss leapt", 7)
    logging.getLogger("pipeline.training.pretrain_loop").info("nothing")
    logging.getLogger("elsewhere").warning("not ours")
logging.getLogger("pipeline.training.pretrain_loop").warning("too late")
"""


def test_a_warning_of_another_process_is_shown_once(tmp_path, caplog):
    (tmp_path / FILE).write_text('{"warning": "of an earlier call"}\n')
    with caplog.at_level(logging.WARNING), showing(tmp_path):
        subprocess.run([sys.executable, "-c", WORKER, str(tmp_path)], check=True)
        ends = time.monotonic() + 5
        while not caplog.messages and time.monotonic() < ends:
            time.sleep(0.05)
    assert caplog.messages == ["step 7: the loss leapt"]
    assert '"rank": 3' in (tmp_path / FILE).read_text()


def test_a_folder_that_is_gone_ends_nothing(tmp_path):
    with showing(tmp_path / "gone"):
        pass
    subprocess.run([sys.executable, "-c", WORKER, "/dev/null/nowhere"], check=True, capture_output=True)
