"""Child processes that are watched: deadlines, memory limits, and what is left of one that died."""
