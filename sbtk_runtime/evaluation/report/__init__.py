"""Tables and figures of measured and published results."""
