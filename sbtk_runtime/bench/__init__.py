"""Measurements of a model on this machine: speed, memory, search and retrieval quality."""
