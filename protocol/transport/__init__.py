"""Shells that move the protocol's bytes: TLS, the data channel, the HTTPS control client."""
