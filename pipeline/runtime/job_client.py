"""Jobs of a Ray cluster, over the HTTP address of its dashboard: Ray's own client, and its errors in one line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import EXIT_FAILED, SettingError, StageError
from pipeline.runtime.ray_session import CONNECT_SECONDS

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # what `ray dashboard` and `kubectl port-forward` make of a cluster's
STOPPED = 143  # exit code for a job that was stopped, which Ray does by SIGTERM
SILENCE = 120.0  # seconds without an answer after which following a log is given up
_PAUSE = 1.0  # seconds


def connect(address: str | None) -> Any:
    """Ray's client for the jobs of a cluster.

    Args:
        address: ``http://HOST:PORT`` of the dashboard. None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS if it is such an
            address, or the default port on this machine.

    Returns:
        A `ray.job_submission.JobSubmissionClient` that has reached the cluster.

    Raises:
        SettingError: The address is malformed, nothing answers there, or the token is missing or wrong.
    """
    known = [os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
    address = address or next((url for url in known if url.startswith("http")), DEFAULT_ADDRESS)
    parts = urllib.parse.urlsplit(address)
    with _malformed(address):
        host, port = parts.hostname, parts.port
    if parts.scheme not in ("http", "https") or not host or parts.username:
        raise SettingError(f"--address {_shown(address)}: give the dashboard's address, such as {DEFAULT_ADDRESS}")
    try:
        socket.create_connection((host, port or (443 if parts.scheme == "https" else 80)), CONNECT_SECONDS).close()
    except OSError as error:
        raise SettingError(
            f"--address {address}: no Ray dashboard answers there ({error}); for a cluster of `ray up`, keep "
            "`ray dashboard cluster.yaml` running and use the address that it prints"
        ) from None
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers RAY_ADDRESS to the client's argument
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    with answered(address):
        return JobSubmissionClient(address)


@contextlib.contextmanager
def _malformed(address: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SettingError(f"--address {_shown(address)}: {error}; give http://HOST:PORT") from None


def _shown(address: str) -> str:
    return address.rpartition("@")[2]


@contextlib.contextmanager
def answered(address: str) -> Iterator[None]:
    """Turn errors of Ray's client in the block into SettingError or StageError.

    Args:
        address: For messages.
    """
    from ray.exceptions import AuthenticationError

    try:
        yield
    except BrokenPipeError:  # of what reads the output
        raise
    except AuthenticationError:
        raise SettingError(
            f"{address}: the cluster did not accept the authentication token; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        ) from None
    except (RuntimeError, ConnectionError, OSError, ValueError) as error:  # of requests, or what Ray makes of an answer
        text = " ".join(str(error).split())[:300]
        if "does not exist" in text and "404" in text:
            raise SettingError(f"{address}: no such job; `wavemim status` lists the jobs") from None
        raise StageError(f"{address}: the Ray dashboard failed: {text}") from None


def follow(client: Any, job: str, write: Callable[[str], object]) -> int:
    """Write a job's log until the job ends; lost connections are made again.

    Args:
        client: Of `connect`.
        job: The job's ID.
        write: Called with pieces of the log.

    Returns:
        The job's exit code.

    Raises:
        StageError: The cluster does not answer for `SILENCE` seconds.
    """
    shown, lost = 0, None
    broken: list[OSError] = []  # of `write`
    while True:
        seen = 0

        def take(text: str) -> None:
            nonlocal seen, shown
            if new := text[max(0, shown - seen) :]:
                try:
                    write(new)
                except OSError as error:
                    broken.append(error)
                    raise
            seen += len(text)
            shown = max(shown, seen)

        with contextlib.suppress(Exception):  # of aiohttp, whatever cut the connection; the status below decides
            asyncio.run(_tail(client, job, take))
        if broken:
            raise broken[0]
        try:
            with answered(client.get_address()):
                info = client.get_job_info(job)
            lost = None
        except StageError as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > SILENCE:
                raise StageError(
                    f"{error}; the job may still be running: wavemim logs {job} shows its log again"
                ) from None
        else:
            if info.status.is_terminal():
                return exit_code(info)
        time.sleep(_PAUSE)


async def _tail(client: Any, job: str, take: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(job):
        take(text)


def exit_code(info: Any) -> int:
    """The exit code of a job that has ended.

    Args:
        info: Ray's `JobDetails`.

    Returns:
        That of the job's command; `STOPPED` if it was stopped, 1 if the command was never started.
    """
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    return STOPPED if str(info.status) == "STOPPED" else EXIT_FAILED


def outcome(job: str, info: Any) -> str:
    """What became of a job that has ended, in one line.

    Args:
        job: Its ID.
        info: Ray's `JobDetails`.
    """
    status = str(info.status)
    if status == "SUCCEEDED":
        return f"job {job} succeeded"
    if status == "STOPPED":
        return f"job {job} was stopped"
    if info.driver_exit_code is not None:
        return f"job {job} failed with exit code {info.driver_exit_code}"
    message = next((line.strip() for line in (info.message or "").splitlines() if line.strip()), "no reason given")
    return f"job {job} could not be started: {message[:300]}"
