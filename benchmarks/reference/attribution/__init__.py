"""Other libraries' training data attribution, each at the settings that its authors recommend and some beside them."""
