"""One batch at the posterior mean, and products of its Jacobian with the posterior covariance."""
