"""Data sets on disk, and their division for zero-shot training."""
