"""A Debian guest with a real systemd: `make guest`."""
