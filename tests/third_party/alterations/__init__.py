"""What another package adds to biassurgery: a mode, a bias, a quantity and a statistic."""
