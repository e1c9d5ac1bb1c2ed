"""Command line: one file per group of commands; nothing is computed here."""
