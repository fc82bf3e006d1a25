"""From a training run to a verified model bundle."""
