"""Latents: encoding what a plan shows, and finding it again."""
