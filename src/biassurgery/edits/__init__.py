"""Register tokens of vision transformers: their means, and tokens that are made to act as some."""
