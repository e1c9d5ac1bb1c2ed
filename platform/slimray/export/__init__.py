"""Networks that leave torch: converted to a format, verified against torch on real samples, timed, and run there."""
