"""The service on the machine: tracks changed blocks of its disks and sends them to a process server."""
