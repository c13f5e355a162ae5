"""A stage as the command line runs it, on a Ray that is there already."""


def run_stage(stage, recipe, session=None, **options):
    """Checks of the settings and of the inputs, then the work; returns the result."""
    for check in stage.CHECKS:
        check(recipe)
    return stage.run(recipe, session, stage.check(recipe), **{"progress": False, **options})
