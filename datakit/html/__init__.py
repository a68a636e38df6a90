"""HTML pages in one file, without a network: sections, tables, figures, pictures."""
