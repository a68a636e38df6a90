"""Recipes: rules that turn scores into a status, deciding by them, and what another threshold would do."""
