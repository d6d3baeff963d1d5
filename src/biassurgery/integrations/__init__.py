"""What this library does together with others, which are imported when they are used."""
