"""Whole jobs, one file each, for the verbs of the command line and for Python code to call."""
