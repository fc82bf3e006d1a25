"""Training batches: sampling, rendering, augmentation and shards."""
