"""For timm, whose sdist has all its tests."""
