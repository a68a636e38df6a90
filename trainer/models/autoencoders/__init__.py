"""Video autoencoders, their losses, and tiling."""
