"""Each example's own gradient from a recorded pass, and whether it has one."""
