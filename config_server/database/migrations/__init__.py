"""Schema changes, one module each, never edited once released."""
