"""Evaluation for research, `sbtk bench` and `sbtk report`; not needed to answer queries."""
