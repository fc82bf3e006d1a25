"""Students, backbones and teachers."""
