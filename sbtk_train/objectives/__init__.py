"""What each method learns from: losses, memory, and knowledge kept or looked up."""
