"""What people read: reports, curves, model cards and tables."""
