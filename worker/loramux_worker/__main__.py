"""`python -m loramux_worker` is the command `loramux`."""

from loramux_worker.cli import main

main()
