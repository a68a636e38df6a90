"""Training on a selection of the catalog. Nothing here yet."""
