"""Rebuilds disks from storage and a recovery key file; needs nothing else."""
