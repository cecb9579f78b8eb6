"""Whether the line that is recommended trains other people's networks as well as AdamW: see `__main__`."""
