"""Bulk sampling; its outputs are catalogs. Nothing here yet."""
