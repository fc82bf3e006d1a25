"""Engines: prepared pixels in, unit embeddings out, by whatever library a machine has."""
