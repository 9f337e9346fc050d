"""The same as ``mtrl benchmark``: python scripts/benchmark.py --help."""

import typer

from mtrl.cli import benchmark

if __name__ == "__main__":
    typer.run(benchmark)
