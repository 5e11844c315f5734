"""`python -m qkernels`: the console script."""

from .cli import main

main()
