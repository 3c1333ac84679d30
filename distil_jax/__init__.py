"""Distils BERT-like encoders on TPUs and GPUs; this is the table of contents of what research code calls."""

__version__ = "0.1.0"
