"""`python -m slimray.cli`."""

from slimray.cli.main import main

main()
