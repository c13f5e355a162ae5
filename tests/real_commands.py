"""Training stages as real commands, in process groups of their own, for tests that disturb them."""

import subprocess
import sys
import time

import psutil


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
    return [child for child in children if child.name().startswith("ray::RayTrainWo")]
