"""What hardware allows."""
