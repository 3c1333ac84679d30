"""What is written and read: model folders, checkpoints, metrics."""
