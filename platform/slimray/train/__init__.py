"""One run on many ranks: loop, workers, health, planner."""
