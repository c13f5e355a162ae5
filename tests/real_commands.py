"""Training stages as real commands, in process groups of their own, for tests that disturb them."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import psutil

WORKERS = ("ray::RayTrainWo", "ray::train_alon")  # processes that train: of a group, and a single one


def start(stage, file, *more):
    """`wavemim STAGE` with a recipe file and further settings."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", stage, "--quiet", "-r", str(file), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_images(folder, images, process, seconds=300):
    """Until there is a checkpoint after so many images in the stage's folder."""
    ends = time.monotonic() + seconds
    while not any(int(path.name.partition("-")[2]) >= images for path in folder.glob("images-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, "no checkpoint in time"
        time.sleep(0.05)


def workers_of(process):
    """The training workers of a command."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.name().startswith(WORKERS)]


class Interrupted:
    """`wavemim …` on a terminal of its own, or without one, to be interrupted; its end is measured."""

    def __init__(self, *arguments, terminal=True):
        self.terminal, self.output = terminal, b""
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        if terminal:
            self.pid, self._reads = pty.fork()
            if self.pid == 0:
                os.execv(command[0], command)
        else:
            self._reads, writes = os.pipe()
            process = subprocess.Popen(command, stdout=writes, stderr=writes, start_new_session=True)
            os.close(writes)
            self.pid = process.pid
            process.returncode = 0  # waited for below
        self.process = psutil.Process(self.pid)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # of a terminal without processes
            while more := os.read(self._reads, 65536):
                self.output += more

    def wait(self, condition, seconds=300):
        """Until a condition, a function of the command's descendants, holds; otherwise the command is killed."""
        ends = time.monotonic() + seconds
        try:
            while not condition(self.process.children(recursive=True)):
                assert self.process.status() != psutil.STATUS_ZOMBIE, self.output.decode(errors="replace")
                assert time.monotonic() < ends, f"not in time; {self.output.decode(errors='replace')}"
                time.sleep(0.05)
        except BaseException:
            for process in [*self.process.children(recursive=True), self.process]:
                process.kill()
            raise

    def interrupt(self, number=signal.SIGINT):
        """Type Ctrl-C where there is a terminal, or send the signal; returns the time of it."""
        if self.terminal and number == signal.SIGINT:
            os.write(self._reads, b"\x03")
        else:
            os.kill(self.pid, number)
        return time.monotonic()

    def end(self, since):
        """Exit code, what was printed, and seconds since a time; asserts that no process of the command is left."""
        family = self.process.children(recursive=True)
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - since
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
        self._reader.join(10)
        os.close(self._reads)
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.output.decode(errors="replace")).replace("\r", "\n")
        return os.waitstatus_to_exitcode(status), text, seconds
