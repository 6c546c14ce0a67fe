"""Where a run's files live."""
