"""What every stage runs in: the Ray session, the stage's folder, usage, progress and formatting."""
