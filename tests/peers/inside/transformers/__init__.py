"""For transformers, whose sdist has the common tests and nothing that runs them."""
