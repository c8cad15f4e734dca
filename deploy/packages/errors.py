"""What stops a build."""

from __future__ import annotations


class BuildFailed(Exception):
    """Its text says what is missing or wrong, and what to do."""
