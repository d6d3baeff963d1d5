"""What is put beside the unpacked tests of transformers; not collected here."""
