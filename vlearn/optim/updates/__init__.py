"""How the mean and the precision move: the arithmetic of a step, and where its curvature comes from."""
