"""Training a video autoencoder."""
