"""Networks and operators on point clouds."""
