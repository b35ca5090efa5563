"""Subcommands of the `shoal` command line."""
