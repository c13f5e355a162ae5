"""`wavemim logs` and `wavemim stop`: jobs of a Ray cluster that were submitted."""

from __future__ import annotations

import time

import click

_ADDRESS = click.option("--address", metavar="URL", help="of the cluster's dashboard  [default: http://127.0.0.1:8265]")


@click.command("logs")
@_ADDRESS
@click.option("--follow", "-f", is_flag=True, help="until the job ends; the exit code is then that of the job")
@click.argument("job")
def logs(address: str | None, follow: bool, job: str) -> None:
    """Show the log of a job, by the ID that `wavemim submit` printed and `wavemim status` lists."""
    from pipeline.runtime import job_client

    client = job_client.connect(address)
    with job_client.answered(client.get_address()):
        info = client.get_job_info(job)
        if not follow:
            click.echo(client.get_job_logs(job), nl=False)
    code = job_client.follow(client, job, lambda text: click.echo(text, nl=False)) if follow else 0
    if follow or info.status.is_terminal():
        click.echo(job_client.outcome(job, client.get_job_info(job)), err=True)
    if code:
        raise click.exceptions.Exit(code)


@click.command("stop")
@_ADDRESS
@click.argument("job")
def stop(address: str | None, job: str) -> None:
    """Stop a job; training saves a checkpoint first. The same command submitted again resumes from it."""
    from pipeline.runtime import job_client

    client = job_client.connect(address)
    with job_client.answered(client.get_address()):
        if client.stop_job(job):
            while not client.get_job_info(job).status.is_terminal():
                time.sleep(0.5)
        click.echo(job_client.outcome(job, client.get_job_info(job)))
