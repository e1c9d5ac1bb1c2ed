"""Search strategies, agents (AMC, HAQ), Pareto fronts, and the predictor of scores."""
