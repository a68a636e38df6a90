"""One file a format of other tools, found by its name: how it is written and how it is read."""
