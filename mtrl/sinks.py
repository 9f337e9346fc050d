"""Mirrors of the metrics that need a package of their own: Weights & Biases and TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtrl.log import Sink


def wandb_mode() -> str:
    """How W&B would run: ``WANDB_MODE`` if set, ``online`` if an API key is configured, else ``offline``.

    Reads environment and files only; asks neither the network nor the user.
    """
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


class Wandb(Sink):
    """Weights & Biases. Offline runs are written below ``out/wandb``; ``wandb sync`` uploads them later."""

    def __init__(
        self,
        out: Path,
        config: Mapping[str, Any],
        *,
        mode: str,
        project: str,
        group: str | None,
        job_type: str,
        tags: Sequence[str],
    ) -> None:
        import wandb

        self._wandb = wandb
        mode = wandb_mode() if mode == "auto" else mode
        self._run = wandb.init(
            dir=out,
            config=dict(config),
            project=project,
            group=group,
            job_type=job_type,
            tags=list(tags),
            name=out.name,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One history row."""
        self._run.log({**metrics, "global_step": step})
