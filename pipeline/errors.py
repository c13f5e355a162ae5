"""What a user can act on: one line each."""


class StageError(RuntimeError):
    """A stage cannot go on, for a reason that the user can act on: one line."""


class SettingError(ValueError):
    """A mistake in the settings: one line that says what was wrong, what is allowed and what to do."""
