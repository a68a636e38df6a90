"""Captions: prompts, the stage that writes them, the language and quality of what was written."""
