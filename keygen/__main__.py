"""`python -m keygen`."""

from keygen.service import main

main()
