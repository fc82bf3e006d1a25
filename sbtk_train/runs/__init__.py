"""Training runs: from a configuration to a folder with a student and its metrics."""
