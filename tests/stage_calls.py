"""The command line and the stages, as tests call them."""

import sys

from pipeline import cli


def wavemim(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of one call of the command."""
    monkeypatch.setattr(sys, "argv", ["wavemim", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_stage(stage, recipe, session=None, **options):
    """The result of a stage, run as the command runs it, on a Ray that is there already."""
    for check in stage.CHECKS:
        check(recipe)
    return stage.run(recipe, session, stage.check(recipe), **{"progress": False, **options})
