"""Benchmarks of engines, search and retrieval quality."""
