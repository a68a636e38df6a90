"""The plan: which bucket each selected clip goes to, the global order of batches, and why a clip cannot train."""
