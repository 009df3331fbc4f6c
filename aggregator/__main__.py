"""`python -m aggregator`."""

from aggregator.main import main

main()
