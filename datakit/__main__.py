"""`python -m datakit` is the command `datakit`."""

from datakit.cli.app import main

main()
