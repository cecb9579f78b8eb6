"""How a posterior precision is kept in the optimizer's state, and drawn from."""
