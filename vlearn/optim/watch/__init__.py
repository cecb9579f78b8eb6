"""Hooks on the user's model that draw in its training forward passes and record them."""
