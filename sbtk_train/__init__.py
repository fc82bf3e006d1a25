"""Training of the students: data, losses, recipes and the loop."""
