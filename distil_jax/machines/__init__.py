"""What hardware allows: chips, FLOPs, ahead-of-time compilation and rooflines."""
