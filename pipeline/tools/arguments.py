"""Arguments that several tools take: places that they write to, and MLflow's address."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.errors import SettingError
from pipeline.runtime import ray_job
from pipeline.shards.shard_set import MANIFEST

PNG = b"\x89PNG\r\n\x1a\n"


class Output(click.ParamType):
    """The type of every option and argument that names what a tool writes: refused where Ray would delete it."""

    name = "path"

    def __init__(self, *, url: bool = False) -> None:
        """
        Args:
            url: Whether it may be a URL.
        """
        self._url = url

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value as it is, given or default. Raises SettingError."""
        assert param is not None
        shown = param.opts[-1] if isinstance(param, click.Option) else param.human_readable_name
        ray_job.check_kept(f"{shown} {value}", value, url=self._url)
        return value


def check_output(path: Path, *, picture: bool) -> None:
    """Check a file before it is written.

    Args:
        path: The file.
        picture: Whether it is a PNG, which may replace only another PNG; otherwise it is JSON.

    Raises:
        SettingError: It cannot be written there.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise SettingError(
            f"'{path}' cannot be written: {'a folder' if path.is_dir() else 'its folder does not exist'}"
        )
    if path.absolute().parent.joinpath(MANIFEST).is_file():
        raise SettingError(f"'{path}' lies in a shard set; use a place outside of it")
    if not picture and path.suffix.lower() != ".json":
        raise SettingError(f"numbers '{path}': JSON is written, use a name that ends with .json")
    if picture and path.suffix.lower() != ".png":
        raise SettingError(f"picture '{path}': a PNG is written, use a name that ends with .png")
    if picture and path.exists() and not path.read_bytes().startswith(PNG):
        raise SettingError(f"picture '{path}' exists and is not a PNG; use another name")


def tracking_uri(settings: Sequence[str], tool: str) -> str | None:
    """The value of tracking.uri=, the only setting that some tools take.

    Args:
        settings: Settings as typed, KEY=VALUE.
        tool: Name of the tool, for the message.

    Returns:
        The last address that is given, or None.

    Raises:
        SettingError: Another setting is given, or no value.
    """
    uri = None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key != "tracking.uri" or not value:
            raise SettingError(f"{setting}: {tool} takes no setting except tracking.uri=URI")
        uri = value
    return uri
