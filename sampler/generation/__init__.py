"""Sampling in bulk: from prompts through texts, denoising and decoding to videos and a catalog of them."""
