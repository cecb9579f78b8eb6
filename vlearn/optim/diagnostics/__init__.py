"""Whether a posterior learns, what the loss says of it, and what to change where something is wrong."""
