"""`make demo`: searches photos from Python packages with sketches drawn for the project."""
