"""python -m flowturbo: the command line."""

from .cli import run

run()
