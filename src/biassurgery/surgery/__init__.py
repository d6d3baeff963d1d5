"""Attention modules whose softmax goes through the core of this library: how one is changed, and
the changes.
"""
