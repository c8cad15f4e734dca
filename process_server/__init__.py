"""Receives change sets, seals them, caches them durably, acknowledges, and uploads them as segments."""
