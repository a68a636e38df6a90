"""The models and their maths. Training on a selection of the catalog is not here yet."""
