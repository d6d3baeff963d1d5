"""What was measured, as frozen data that is saved, loaded, added and printed."""
