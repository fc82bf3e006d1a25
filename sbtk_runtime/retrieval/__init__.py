"""Retrieval figures: the rules that they carry, and the metrics on arrays."""
