"""A mode and a kind of explicit bias that another package adds to biassurgery."""
