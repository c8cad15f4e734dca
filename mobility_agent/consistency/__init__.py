"""Freeze points: holding the file systems of this machine still for a moment, and what that makes of a point."""
