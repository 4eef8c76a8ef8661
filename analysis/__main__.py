"""`python -m analysis`: the same as the command `qvw`."""

from analysis.cli import main

main()
