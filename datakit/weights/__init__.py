"""Weights of models: which there are (`registry`), where they come from (`hubs`), bringing them here (`download`)."""
