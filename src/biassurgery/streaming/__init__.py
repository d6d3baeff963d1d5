"""Endless streams in a cache of constant size: sinks and a window (Xiao et al. 2023)."""
