"""One pass over data, and what is measured on the way."""
