"""From what users have to batches: reading, windows, transforms, tokenizers, packaged data."""
