"""What a user can act on when a stage cannot go on; mistakes in settings are `pipeline.config.SettingError`."""


class StageError(RuntimeError):
    """A stage cannot go on, for a reason that the user can act on: one line."""
