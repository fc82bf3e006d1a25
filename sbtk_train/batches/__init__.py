"""What a training step sees: which images, changed how, shared among how many processes."""
