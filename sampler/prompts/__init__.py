"""Prompts: where they come from, what they refer to, how they are completed and rewritten."""
