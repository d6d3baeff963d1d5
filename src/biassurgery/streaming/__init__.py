"""Endless streams in a cache of constant size: attention sinks and a sliding window (Xiao et al.
2023).
"""
