"""What a run has learned, as files that other code loads."""
