"""``python -m fedsieve``: the command line."""

from fedsieve.cli import main

main()
