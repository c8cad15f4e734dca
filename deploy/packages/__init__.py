"""Makes what is installed: the wheel, a Debian package per program, the offline bundle, checksums, a bill of materials.

Invariants: what is packaged is the commit and the lock file, not the working tree and not the newest on an index; one
commit gives the same bytes again, as far as its tools do.
"""
