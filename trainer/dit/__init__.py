"""Training a diffusion transformer."""
