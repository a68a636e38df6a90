"""The catalog: Delta Lake tables, their schema, and what can be asked of them."""
