"""For open_clip, whose sdist has all its tests, and a program that makes their reference data."""
