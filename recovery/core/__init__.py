"""What recovery decides without touching anything: which frames to read, and which point is meant."""
