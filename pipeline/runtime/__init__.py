"""What every stage needs to run: the Ray session, the stage's folder, cost, progress and formatting."""
