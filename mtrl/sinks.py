"""What a sink is, and the mirrors that need a package of their own: Weights & Biases and TensorBoard."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtrl.registry import MissingPackageError
from mtrl.types import Episode

_log = logging.getLogger(__name__)
_RUN_ID = "wandb-id"  # file in the run's folder; a resumed run goes on in the same W&B run


class Sink:
    """Receives what the logger is told. A sink overrides what it can show."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of training at an environment step."""

    def evaluation(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of an evaluation at an environment step."""
        self.log(metrics, step)

    def episode(self, task: str, episode: Episode, step: int, score: float) -> None:
        """A finished training episode; ``score`` is its normalised return."""

    def notice(self, text: str) -> None:
        """A sentence for the user."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's final results."""

    def video(self, path: Path, name: str, step: int) -> None:
        """A video file (mp4 or gif)."""

    def close(self, status: str) -> None:
        """The run is over: ``finished``, ``interrupted`` or ``failed``."""


def wandb_mode() -> str:
    """How W&B would run now: ``online`` if an API key is configured, else ``offline``.

    ``WANDB_MODE`` and W&B's own settings come first. Asks neither the network nor the user.
    """
    import wandb

    mode = wandb.setup().settings.mode
    if mode != "online":  # the default
        return mode
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


class Wandb(Sink):
    """Weights & Biases, over the step metric ``global_step``.

    Offline runs are written below ``out/wandb``; ``wandb sync`` uploads them later. If the server cannot be reached,
    the run is written offline.

    Args:
        out: the run's folder.
        config: plain data.
        mode: ``auto``, ``online`` or ``offline``.
        project: where the run is filed.
        group: runs of one agent on one suite.
        job_type: what kind of run it is.
        tags: words to find it by.
    """

    def __init__(
        self,
        out: Path,
        config: Mapping[str, Any],
        *,
        mode: str = "auto",
        project: str = "mtrl",
        group: str | None = None,
        job_type: str = "train",
        tags: Sequence[str] = (),
    ) -> None:
        import wandb

        out.mkdir(parents=True, exist_ok=True)
        id_file = out / _RUN_ID
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")

        def start(how: Any) -> wandb.Run:
            return wandb.init(
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=out,
                name=out.name,
                project=project,
                group=group,
                job_type=job_type,
                tags=[tag[:64] for tag in tags if tag],  # what W&B accepts
                config=dict(config),
                mode=how,
                settings=wandb.Settings(console="off", silent=True, init_timeout=30),
            )

        try:
            self._run = start(wandb_mode() if mode == "auto" else mode)
        except wandb.Error as error:  # wrong key, no network
            if mode == "offline":
                raise
            _log.warning("W&B cannot go online (%s): this run is written offline, `wandb sync` uploads it", error)
            self._run = start("offline")
        self._video = wandb.Video
        self._run.define_metric("global_step")
        self._run.define_metric("*", step_metric="global_step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One history row."""
        self._run.log({**metrics, "global_step": step})

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's summary."""
        self._run.summary.update(dict(values))

    def video(self, path: Path, name: str, step: int) -> None:
        """A copy of the file, as media."""
        self._run.log(
            {name: self._video(str(path), format="gif" if path.suffix == ".gif" else "mp4"), "global_step": step}
        )

    def close(self, status: str) -> None:
        """Write everything out; a run that did not finish counts as failed."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "finished" else 1)


class TensorBoard(Sink):
    """Event files for TensorBoard.

    Args:
        folder: of the event files.
        config: plain data, shown as text.
        resume_at: hides the records after this step that an earlier process wrote.

    Raises:
        MissingPackageError: the extra is not installed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_at: int | None = None) -> None:
        self._writer = self.writer()(str(folder), purge_step=None if resume_at is None else resume_at + 1)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1, default=str)}\n```")

    @staticmethod
    def writer() -> Any:
        """The class that writes the files; raises as the constructor does."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            what = "TensorBoard is not installed: pip install 'mtrl-suite[track]'"
            raise MissingPackageError(what, name="tensorboard") from error
        return SummaryWriter

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        """Write everything out."""
        self._writer.close()
