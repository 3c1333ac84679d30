"""What people read: reports with tables and curves, comparisons, plans and model cards."""
