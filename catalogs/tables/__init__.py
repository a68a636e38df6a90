"""What is stored: the schema, the Delta tables, the view that joins them, upgrades, and the integrity of the files."""
