"""What a run writes to the catalog, and the protocol by which it is all there or not at all."""
