"""The same as ``mtrl evaluate``: python scripts/evaluate.py --help."""

import typer

from mtrl.cli import evaluate

if __name__ == "__main__":
    typer.run(evaluate)
