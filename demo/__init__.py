"""`make demo`: sketches drawn for the project find photographs that come with Python packages."""
