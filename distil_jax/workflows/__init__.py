"""Whole jobs, one file each; the verbs of the command line call them, and so may Python code."""
