"""Object stores behind one contract (`object_store.py`), which every one of them passes by the same suite."""
