"""What is predicted: scores, and a run's network as a function."""
