"""How well an autoencoder reconstructs."""
