"""Reads and writes model folders, checkpoints and metrics."""
