"""Models whose weights are spread over processes."""
