"""`wavemim status`: the jobs of a Ray cluster, and how far the stages are that run on it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import click

from pipeline.config.places import printable
from pipeline.runtime.formatting import duration
from pipeline.tracking.store_uris import without_password

_SHOWN = 10  # jobs that have ended
_ENTRYPOINT = 100  # characters


@click.command("status")
@click.option("--address", metavar="URL", help="of the cluster's dashboard  [default: http://127.0.0.1:8265]")
def command(address: str | None) -> None:
    """Show what runs on a cluster: stages with progress, rate and time left, and the latest jobs that have ended.

    Stages are shown however they were started: as jobs, or by a command on a machine of the cluster.
    """
    from pipeline.runtime import job_client, ray_internals
    from pipeline.runtime.observability import file_of

    client = job_client.connect(address)
    with job_client.answered(client.get_address()):
        jobs = sorted(client.list_jobs(), key=lambda job: job.start_time or 0)
        running = [job for job in jobs if not job.status.is_terminal()]
        for job in running:
            found = None
            if job.job_id and job.driver_info:
                text = ray_internals.read_log(client, job.driver_info.node_ip_address, file_of(job.job_id))
                found = _parsed(text)
            click.echo(line(job, found, time.time()))
        if not running:
            click.echo("nothing is running")
        for job in [job for job in jobs if job.status.is_terminal() and job.submission_id][-_SHOWN:]:
            click.echo(f"{job_client.outcome(job.submission_id, job)}  {_shortened(job.entrypoint)}")


def line(job: Any, found: Mapping[str, Any] | None, now: float) -> str:
    """A line about a job that has not ended.

    Args:
        job: Ray's `JobDetails`.
        found: What its stage has published; None if nothing.
        now: The time, in seconds of the epoch.
    """
    name = job.submission_id or f"driver {job.job_id}"
    since = duration(now - job.start_time / 1000) if job.start_time else "?"
    if found is None:
        return f"{name}  {str(job.status).lower()} for {since}  {_shortened(job.entrypoint)}"
    numbers = found["numbers"]
    said = [f"{found['done']:,} of {found['total']:,} {found['unit']} ({numbers['wavemim_progress']:.1%})"]
    if rate := numbers.get("wavemim_images_per_second"):
        said.append(f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s")
    if "wavemim_loss" in numbers:
        said.append(f"loss {numbers['wavemim_loss']:.4g}")
    if rejected := numbers.get("wavemim_rejected_images"):
        said.append(f"{rejected:,.0f} rejected")
    states = {key.partition(".")[2]: value for key, value in numbers.items() if key.startswith("wavemim_trials.")}
    said += [f"{value:.0f} {state}" for state, value in states.items() if value]
    if (left := numbers.get("wavemim_seconds_left")) is not None:
        said.append(f"{duration(max(0.0, left - (now - found['time'])))} left")
    if now - found["time"] > 60:
        said.append(f"no update for {duration(now - found['time'])}")
    return f"{name}  {found['stage']} of {found['run']}, for {since}: {', '.join(said)}"


def _parsed(text: str | None) -> Mapping[str, Any] | None:
    try:
        content = json.loads(text[text.index("{") :]) if text else None
        return content if isinstance(content, dict) and "numbers" in content else None
    except ValueError:  # it was being replaced
        return None


def _shortened(entrypoint: str) -> str:
    text = printable(without_password(" ".join(entrypoint.split())))
    return text if len(text) <= _ENTRYPOINT else f"{text[: _ENTRYPOINT - 1]}…"
