"""What research and `sbtk bench` and `sbtk report` need; nothing that answers queries."""
