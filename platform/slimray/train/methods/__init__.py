"""Training methods: the computation of a step, one file per method."""
