"""Training workers on Ray Train: groups of them, heartbeat, stragglers and logs."""
