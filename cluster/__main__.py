"""`python -m cluster` is `attune`."""

from cluster.cli import main

main()
