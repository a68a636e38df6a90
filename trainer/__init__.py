"""Training on a selection of a catalog: plan, read or encode, train a DiT or a VAE, and write back what was learned."""
