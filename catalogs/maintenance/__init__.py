"""Rare and dangerous operations, apart from the rest: validate, forget, rewrite the log, relink."""
