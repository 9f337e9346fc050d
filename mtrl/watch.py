"""Episodes as one video: a tile per task, in which its episodes follow each other.

Episodes are played again from their journals, so nothing is rendered while an agent trains or is evaluated. All tiles
play at once, each holds one picture, and an mp4 is written as they come: long episodes cost time, not memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtrl import registry, runs
from mtrl.config import RunConfig
from mtrl.evaluate import Evaluation, evaluate
from mtrl.highlights import KINDS, Highlights
from mtrl.registry import UnknownNameError
from mtrl.spaces import make_spec
from mtrl.types import Array, Episode, Task
from mtrl.vector import Moment, RenderError, moments
from mtrl.video import FORMATS, page, write_video

_log = logging.getLogger(__name__)

PICKS = ("all", *KINDS)
_EMPTY = np.full((3, 4, 3), 40, np.uint8)
PAUSE = 0.5  # seconds that an episode's end stays, darkened, before the next one


class WatchError(RuntimeError):
    """Episodes that cannot be shown; the message says why."""


class Reel(NamedTuple):
    """What one tile shows."""

    task: Task
    episodes: Sequence[Episode]


def film(
    reels: Sequence[Reel],
    path: Path,
    *,
    fps: float = 15,
    height: int = 224,
    max_frames: int = 300,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a video of ``reels`` to ``path`` (.mp4 or .gif), atomically; a label says task, return and success so far.

    A task that cannot be drawn has an empty tile, and a warning says why.

    Args:
        reels: what to show, at least one episode each.
        path: the file; its folder is made if missing.
        fps: pictures per second.
        height: pixels of each tile, without its label.
        max_frames: pictures per episode, at least 2. A longer episode is shown at every second, third, ... step, from
            its start to its end; its label says ``x2``, ``x3``, ...
        progress: told how many pictures of how many are done.

    Raises:
        RenderError: no task can be drawn; about the first.
        WatchError: an episode's return is not the recorded one.
        UnknownNameError: another suffix.
        GifTooLongError: see ``mtrl.video``.
    """
    check_format(path)
    pause = math.ceil(PAUSE * fps)
    total = max(sum(_pictures(one, max_frames) + pause for one in reel.episodes) for reel in reels)
    return write_video(path, _pages(reels, height, max_frames, pause, lambda done: progress(done, total)), fps)


def check_format(path: Path) -> None:
    """Raise ``UnknownNameError`` unless the suffix of ``path`` is that of a video that ``film`` can write."""
    if path.suffix not in FORMATS:
        raise UnknownNameError("kind of video", path.suffix, FORMATS, f"for {path}")


def select(tasks: Sequence[Task], names: Sequence[str]) -> tuple[Task, ...]:
    """Those of ``tasks`` that ``names`` mention, with or without the suite's name; all if there are no names.

    Raises:
        UnknownNameError: a name that no task has.
    """
    short = {task.name: task.name.partition("/")[2] for task in tasks}
    for name in names:
        if name not in short and name not in short.values():
            raise UnknownNameError("task", name, short)
    return tuple(task for task in tasks if not names or task.name in names or short[task.name] in names)


def played(
    source: Path | RunConfig,
    which: str = "all",
    names: Sequence[str] = (),
    *,
    episodes: int | None = None,
    seed: int | None = None,
    step: int | None = None,
    explore: bool = False,
) -> list[Reel]:
    """Seeded episodes of an agent, played now. With the defaults, ``best`` and the like mean the evaluation's episodes.

    Args:
        source: folder of a run or an exported policy; or a configuration, for an agent that has learnt nothing.
        which: see ``pick``.
        names: see ``select``.
        episodes: per task; by default 1, or as many as an evaluation has if ``which`` chooses among them.
        seed: evaluation seed; by default the configuration's.
        step: checkpoint; by default the newest.
        explore: sample actions instead of taking the greedy ones.

    Raises:
        UnknownNameError: an unknown task or ``which``.
        RunError, CheckpointError: there is no such run or checkpoint.
    """
    check_pick(which, PICKS)
    config = runs.config_of(source) if isinstance(source, Path) else source
    policy = runs.load(source, step) if isinstance(source, Path) else runs.untrained(source)
    found = evaluate(
        policy.agent,
        select(policy.tasks, names),
        spec=policy.spec,
        episodes=episodes or (1 if which == "all" else config.eval.episodes),
        seed=config.eval.seed if seed is None else seed,
        explore=explore,
    )
    return pick(found, which)


def pick(evaluation: Evaluation, which: str) -> list[Reel]:
    """Of every task ``all`` evaluated episodes, the ``last``, or that of the highest (``best``) or lowest return."""
    check_pick(which, PICKS)
    reels = []
    for result in evaluation.results:
        index = {"best": result.returns.argmax(), "worst": result.returns.argmin(), "last": -1}
        reels.append(Reel(result.task, result.episodes if which == "all" else (result.episodes[index[which]],)))
    return reels


def record(evaluation: Evaluation, folder: Path, *, step: int) -> list[Path]:
    """Write ``best-STEP.mp4`` and ``worst-STEP.mp4``: each task's episode of highest (lowest) return."""
    return [film(pick(evaluation, name), folder / f"{name}-{step}.mp4") for name in ("best", "worst")]


def training(run: Path, which: str, names: Sequence[str] = ()) -> list[Reel]:
    """The ``best``, ``worst`` or ``last`` training episode of each task of a run, as of its newest checkpoint.

    Raises:
        UnknownNameError: an unknown task or ``which``.
        RunError: ``run`` holds no run.
        WatchError: a task has finished no episode yet, or the run keeps none.
    """
    check_pick(which, KINDS)
    every = registry.tasks(runs.config_of(run).suite)
    tasks = select(every, names)
    path = run / runs.EPISODES
    if not path.is_file():
        raise WatchError(f"{run} holds no training episodes: {path.name} is written with every checkpoint of a run")
    kept = Highlights.read(path, make_spec(every))
    if missing := [task.name for task in tasks if not kept.of(task.name)]:
        raise WatchError(f"no training episode has ended yet: {', '.join(missing)}; choose others with --tasks")
    return [Reel(task, (kept.of(task.name)[which].episode,)) for task in tasks]


def check_pick(which: str, choices: Sequence[str]) -> None:
    """Raise ``UnknownNameError`` unless ``which`` is one of ``choices``."""
    if which not in choices:
        raise UnknownNameError("choice of episodes", which, choices)


def _pages(
    reels: Sequence[Reel], height: int, max_frames: int, pause: int, progress: Callable[[int], None]
) -> Iterator[Array]:
    with ExitStack() as stack:
        tiles = [stack.enter_context(closing(_tile(reel, max_frames, pause))) for reel in reels]
        shown, errors = [], []
        for reel, tile in zip(reels, tiles, strict=True):
            try:
                shown.append(next(tile))
            except RenderError as error:
                errors.append(error)
                shown.append((_EMPTY, f"{reel.task.name}\ncannot be drawn"))
        if len(errors) == len(reels):
            raise errors[0]
        for error in errors:
            _log.warning("%s", error)
        done = 0
        while True:
            yield page([picture for picture, _ in shown], [label for _, label in shown], height)
            progress(done := done + 1)
            following = [next(tile, None) for tile in tiles]
            if all(one is None for one in following):
                return
            shown = [new or old for new, old in zip(following, shown, strict=True)]


def _tile(reel: Reel, max_frames: int, pause: int) -> Generator[tuple[Array, str], None, None]:
    """Pictures [h, w, 3] of one tile with their labels."""
    for number, episode in enumerate(reel.episodes, 1):
        every = _every(episode, max_frames)
        head = f"{reel.task.name}\n" + (f"{number}/{len(reel.episodes)}  " if len(reel.episodes) > 1 else "")
        fast = f"  x{every}" if every > 1 else ""
        with closing(moments(reel.task, episode.journal, every=every)) as playing:
            moment = next(playing)
            yield moment.picture, _label(head, moment, fast)
            for moment in playing:
                yield moment.picture, _label(head, moment, fast, ended=moment.step == episode.length)
        if moment.ret != episode.ret:
            raise WatchError(
                f"{reel.task.name}, seed {episode.seed}: the recorded return is {episode.ret!r}, played again it is "
                f"{moment.ret!r}: this is not the task that was recorded (another version of it?)"
            )
        yield from [(moment.picture // 2, _label(head, moment, fast, ended=True))] * pause


def _label(head: str, moment: Moment, fast: str, *, ended: bool = False) -> str:
    success = "  success" if moment.success else "  no success" if ended and moment.success is not None else ""
    return f"{head}return {moment.ret:.2f}{success}{fast}"


def _every(episode: Episode, max_frames: int) -> int:
    return math.ceil(episode.length / (max_frames - 1))


def _pictures(episode: Episode, max_frames: int) -> int:
    return 1 + math.ceil(episode.length / _every(episode, max_frames))
