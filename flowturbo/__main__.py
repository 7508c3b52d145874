"""python -m flowturbo: the command line."""

from .cli.main import run

run()
