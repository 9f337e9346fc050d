"""The same as ``mtrl train``: python scripts/train.py --help."""

import typer

from mtrl.cli import train

if __name__ == "__main__":
    typer.run(train)
