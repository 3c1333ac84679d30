"""Frozen configuration, one file a subject: dataclasses, read from TOML, changed by `--set a.b=c`, and checked
before a device is touched.

Every field says in its comment what it means; a default that looks odd says where it comes from.
"""
