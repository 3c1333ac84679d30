"""Configuration as frozen dataclasses, one file per subject: read from TOML, overridden by `--set section.key=value`,
and checked before a device is used.

The comment of a field says what it means.
"""
