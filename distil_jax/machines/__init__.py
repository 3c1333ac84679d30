"""What hardware allows: data sheets of chips, FLOPs, ahead-of-time compilation and rooflines."""
