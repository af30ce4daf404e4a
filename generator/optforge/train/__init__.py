"""What surrounds a step in Python: the optimizer, groups, schedules, monitor, checkpoints."""
