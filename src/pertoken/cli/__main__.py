"""`python -m pertoken.cli`, the same as `pertoken`."""

from pertoken.cli import main

main()
