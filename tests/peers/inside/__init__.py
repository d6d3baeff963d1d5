"""What is put beside the unpacked tests of a library; not collected here."""
