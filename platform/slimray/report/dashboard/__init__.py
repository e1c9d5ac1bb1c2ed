"""The live page over all runs of a storage."""
