"""Frozen configuration."""
