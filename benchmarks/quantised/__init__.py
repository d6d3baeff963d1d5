"""What `benchmarks/quantisation.py` is made of: data, remedies, quantisations, cells, intervals."""
