"""The verbs of the command line, one file each: its arguments, then one call."""
