"""The changes in their order; each names the one before it."""
