"""What the configuration server remembers: SQLite when embedded, written to run on PostgreSQL too.

Rows and dictionaries end here; everything outside sees frozen values.
"""
