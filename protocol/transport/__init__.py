"""The protocol's shells: bytes between two programs, over TLS."""
