"""Errors that the user can act on, each with a message of one line."""


class StageError(RuntimeError):
    """A stage cannot continue, for a reason that the user can act on: one line."""


class TrainingEndedError(StageError):
    """Training has failed for a reason that restarting its workers would not fix."""


class SettingError(ValueError):
    """A mistake in the settings: one line that says what was wrong, what is allowed and what to do."""


# Exit codes of the `wavemim` command; those of signals are in pipeline/runtime/interrupts.py.
EXIT_FAILED, EXIT_USER = 1, 2
