"""Exports: a network is converted to another format, verified against torch on real samples, timed, and run there."""
