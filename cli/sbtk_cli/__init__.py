"""The command line of sbtk: one thin file per command."""
