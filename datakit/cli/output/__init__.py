"""What commands print: tables and lines for a terminal, one module for each group of commands."""
