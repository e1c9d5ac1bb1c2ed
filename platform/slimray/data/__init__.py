"""The data path to a network: cards and indexes, samples, the epoch plan, the Ray Data pipeline."""
