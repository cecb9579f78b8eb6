"""What a call costs: time, peak memory, and the calls that are compared."""
