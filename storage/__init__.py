"""The vault's format: segments, keys, names, and the one door to them, `storage.disk_archive`.

`SEGMENT_FORMAT.md` beside this file is the normative description. Only `backends/` and `disk_archive` do I/O.
"""
