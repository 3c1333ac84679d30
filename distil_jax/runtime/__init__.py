"""How a run lives on machines."""
