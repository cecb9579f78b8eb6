"""The parameters of an optimizer: their groups and settings, their state, its saving and loading."""
