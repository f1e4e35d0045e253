"""`python -m kvpress`: the command line."""

from kvpress.cli import main

main()
