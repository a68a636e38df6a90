"""One file a measurement, and the registry of them."""
