"""A run's configuration, folder, record, checkpoints and log."""
