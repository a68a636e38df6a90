"""One module for each autoencoder: its network, sizes, tiles, and the weights that come with it (see `registry`)."""
