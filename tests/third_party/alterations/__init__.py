"""What another package adds to biassurgery: a mode, a kind of explicit bias, a quantity of `record`
and a statistic of `detect`.
"""
