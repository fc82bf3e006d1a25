"""The methods' objectives: losses, memory bank, soft labels and semantic matrix."""
