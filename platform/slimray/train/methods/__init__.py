"""Training methods: what a step computes, one file per method."""
