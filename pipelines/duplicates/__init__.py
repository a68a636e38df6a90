"""Near-duplicates: which clips are similar, and the groups that they form."""
