"""Slots in worker processes: few processes with many slots each, over one block of shared memory.

Why so: one process per environment, the usual choice, spends most of its time in switching and pickling; few workers
with many slots each were the fastest of all arrangements measured (``benchmarks/vector.py``). A step costs one byte
per worker and direction, everything else lies in shared memory.

Workers are plain ``python -c`` children, not ``multiprocessing`` ones: they do not import the parent's main module (and
with it torch), need no ``if __name__ == "__main__"`` guard and inherit no locks. The memory has no name, so nothing
can be left behind, and a worker ends by itself when its parent is gone, however it went. POSIX only.

A worker that raises, is killed, crashes or hangs is replaced: a new process takes its slots, seeds them anew and plays
their journals up to the step that failed, which it then takes again. Nobody upstream can tell, not by one bit.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import numpy as np

from mtrl import registry
from mtrl.types import Array, Task
from mtrl.vector.runner import COST_STEPS, Runner
from mtrl.vector.slots import PARKED, Buffers, EnvironmentFailedError, Program, Running

# Orders and answers are single bytes in pipes (a round trip takes 5.6 us, as with semaphores, and 9.3 us over sockets);
# those with contents are followed by one pickled message.
_STEP, _RESTORE, _DROP, _QUIT = b"s", b"r", b"d", b"q"
_DONE, _ERROR = b"k", b"e"

_BOOT = (
    "import signal, sys, json; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = json.loads(sys.argv[1]); "
    "from mtrl.vector.workers import main; main(json.loads(sys.argv[2]), *map(int, sys.argv[3:]))"
)
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
_CLOSE_SECONDS = 5.0  # that workers get to close their environments before they are killed
_LONGEST = 2**31 - 1  # milliseconds that poll can wait
_SOON = 3e-3  # seconds: a worker whose last order came within this time stays awake for the next one
_RETRIES = 3  # in a row, of one step: what fails more often than that is no accident
_PAUSE = 0.1  # seconds before the first retry; each further one waits twice as long
_MOST_FAULTS = 1000  # in a vector's life
_WORTHWHILE = 0.96  # slots move when the slowest worker's predicted time falls below this part of what it was
_MOST_REST = 64  # times COST_STEPS: slots stay twice as long after each move, but no longer than this


class _Link(NamedTuple):
    """One side's ends of the two pipes between parent and worker."""

    reader: Connection
    writer: Connection
    poller: select.poll  # of the reader; made once, since ``Connection.poll`` makes a new one at every step

    @classmethod
    def of(cls, reader: Connection, writer: Connection) -> _Link:
        poller = select.poll()
        poller.register(reader.fileno(), select.POLLIN)
        return cls(reader, writer, poller)

    def put(self, byte: bytes) -> None:
        os.write(self.writer.fileno(), byte)

    def ready(self, seconds: float) -> bool:
        """Whether there is something to read, or an end, within this time."""
        return bool(self.poller.poll(int(min(seconds * 1000, _LONGEST))))

    def get(self) -> bytes:
        """The next byte; empty if the other side is gone."""
        return os.read(self.reader.fileno(), 1)

    def await_soon(self, last: float) -> float:
        """Wait for something to read, or an end; returns the seconds it took. ``last``: what it took the time before.

        Waking a process that sleeps takes tens of microseconds, in a virtual machine sometimes hundreds, a good part of
        a step. So a process whose orders come quickly, while an agent acts but does not learn, stays awake for a while,
        leaving its core to whoever wants it; one that waits longer sleeps.
        """
        start = time.perf_counter()
        if last < _SOON:
            while not self.poller.poll(0) and time.perf_counter() - start < _SOON:
                os.sched_yield()
        self.poller.poll()
        return time.perf_counter() - start

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


class Workers:
    """The backend that steps slots in ``count`` worker processes (no more than there are slots).

    Raises:
        UnsendableTaskError: a task that cannot be sent to another process.
    """

    resumes = True

    def __init__(self, program: Program, count: int, patience: float = 300.0) -> None:
        self._payload = _pickled(program)
        self._program, self._patience = program, patience
        self.faults: list[str] = []
        count = min(count, len(program.places))
        self._owner = [place.slot % count for place in program.places]
        self._tries = [0] * count
        self._file = _nameless_file()
        self.buffers = Buffers(program, lambda size: _extended(self._file.fileno(), size))
        self._links: list[_Link] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._waiting: list[int] = []
        self._owing: set[int] = set()  # workers that have not answered yet, but to a step
        self._settled = 0  # steps since slots moved, or since the first one
        self._rest = 1  # times COST_STEPS that must have passed before slots move again
        # Also when the vector is forgotten without close(), and at interpreter exit.
        self._finalizer = weakref.finalize(self, _shut_down, os.getpid(), self._links, self._processes, self._file)
        for worker in range(count):
            link, process = self._launch(worker)
            self._links.append(link)
            self._processes.append(process)
        for worker in range(count):  # once all are starting up, since a large payload waits for its reader
            self._brief(worker)

    def restore(self, episodes: Sequence[Running]) -> None:
        """See ``Backend``; all workers at once."""
        for worker in self._owing.union(self._waiting):  # an interrupted call left its answer in the pipe
            self._renew(worker)
        self._owing.clear()
        self._waiting.clear()
        self._restore(episodes, {episode.slot: episode for episode in episodes}.__getitem__)

    def send(self) -> None:
        """Wake all workers."""
        self._settled += 1
        self._waiting = list(range(len(self._links)))
        for worker in self._waiting:
            self._order(worker, _STEP)

    def wait(self, running: Callable[[int], Running]) -> None:
        """Wait for all workers; can be called again if a signal handler interrupted it."""
        while self._waiting:
            worker = self._waiting[0]
            try:
                self._answer(worker)
            except EnvironmentFailedError as error:
                self._replace(worker, error, running)
                self._order(worker, _STEP)
                continue
            self._tries[worker] = 0
            del self._waiting[0]

    def rebalance(self, movable: Sequence[int], running: Callable[[int], Running]) -> None:
        """Even the workers' load out, as far as ``movable`` slots allow; a new owner just begins the same episode.

        A new owner must build the environment: what is won by moving again and again after noise would be lost. So
        slots move once they would have won that time, had they moved when they last did.
        """
        if self._settled < self._rest * COST_STEPS:
            return
        moves = plan_moves(self._owner, self.buffers.cost, movable, len(self._links))
        if not self._pays(moves):
            return
        for slot, worker in moves.items():
            before, self._owner[slot] = self._owner[slot], worker
            self._owing.add(before)
            self._order(before, _DROP, slot)
            try:
                self._answer(before)
            except EnvironmentFailedError as error:
                self._replace(before, error, running)
            self._owing.discard(before)
        self._settled, self._rest = 0, min(2 * self._rest, _MOST_REST)
        self._restore([running(slot) for slot in moves], running)

    def _pays(self, moves: Mapping[int, int]) -> bool:
        if not moves:
            return False
        owner, cost = self._owner, self.buffers.cost
        after = [moves.get(slot, worker) for slot, worker in enumerate(owner)]
        gain = np.bincount(owner, weights=cost).max() - np.bincount(after, weights=cost).max()
        built = np.bincount(list(moves.values()), weights=self.buffers.built[list(moves)])  # by all workers at once
        return gain * self._settled >= built.max()

    def close(self) -> None:
        """End all workers: by themselves, or killed after a few seconds. Never hangs, leaves no process behind."""
        self._finalizer()

    def _launch(self, worker: int) -> tuple[_Link, subprocess.Popen[bytes]]:
        orders, order = Pipe(duplex=False)
        answer, answers = Pipe(duplex=False)
        self.buffers.busy[worker] = PARKED
        with orders, answers:
            inherited = (self._file.fileno(), orders.fileno(), answers.fileno())
            modules = registry.modules(task.name for task in self._program.tasks.values())
            command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), json.dumps(modules)]
            command += [str(value) for value in (*inherited, os.getpid(), worker)]
            environment = {**os.environ, **_ONE_THREAD}
            process = subprocess.Popen(command, pass_fds=inherited, stdin=subprocess.DEVNULL, env=environment)
        return _Link.of(answer, order), process

    def _brief(self, worker: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # a worker that died already: its first answer tells
            self._links[worker].writer.send_bytes(self._payload)

    def _replace(self, worker: int, error: EnvironmentFailedError, running: Callable[[int], Running]) -> None:
        """A new process in place of one that failed, its slots brought to where ``running`` says.

        Raises:
            EnvironmentFailedError: ``error``, or what came after it, if there were too many.
        """
        mine = [running(slot) for slot, owner in enumerate(self._owner) if owner == worker]
        while True:
            self.faults.append(str(error))
            self._tries[worker] += 1
            if self._tries[worker] > _RETRIES or len(self.faults) > _MOST_FAULTS:
                raise error
            time.sleep(_PAUSE * 2 ** (self._tries[worker] - 1))
            self._renew(worker)
            self._order(worker, _RESTORE, mine)
            try:
                return self._answer(worker, _played(mine))
            except EnvironmentFailedError as again:
                error = again

    def _renew(self, worker: int) -> None:
        self._processes[worker].kill()
        self._processes[worker].wait()
        self._links[worker].close()
        self._links[worker], self._processes[worker] = self._launch(worker)
        self._brief(worker)

    def _restore(self, episodes: Sequence[Running], running: Callable[[int], Running]) -> None:
        work: dict[int, list[Running]] = {}
        for episode in episodes:
            work.setdefault(self._owner[episode.slot], []).append(episode)
        self._owing.update(work)
        for worker, mine in work.items():
            self._order(worker, _RESTORE, mine)
        for worker, mine in work.items():
            try:
                self._answer(worker, _played(mine))
            except EnvironmentFailedError as error:
                self._replace(worker, error, running)
            self._owing.discard(worker)
            self._tries[worker] = 0

    def _order(self, worker: int, order: bytes, message: Any = None) -> None:
        link = self._links[worker]
        with contextlib.suppress(BrokenPipeError):  # dead: its answer tells why
            link.put(order)
            if message is not None:
                link.writer.send(message)

    def _answer(self, worker: int, steps: int = 1) -> None:
        """Wait for what may take as long as ``steps`` steps.

        Raises:
            EnvironmentFailedError: the worker raised, is gone, or has taken too long.
        """
        link = self._links[worker]
        if not link.ready(self._patience * steps):
            raise self._died(worker, f"did not answer for {self._patience * steps:g} s")
        try:
            answer = link.get()
            if answer == _DONE:
                return
            if answer == _ERROR:
                slot, message, trace = link.reader.recv()
                raise EnvironmentFailedError(f"{message} (in worker process {worker})", slot, trace)
        except EOFError:
            pass  # died in the middle of its message
        try:
            code = self._processes[worker].wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        raise self._died(worker, how)

    def _died(self, worker: int, how: str) -> EnvironmentFailedError:
        slot = int(self.buffers.busy[worker])
        began = slot != PARKED and self._owner[slot] == worker
        where = self.buffers.where(self._program, slot) if began else "before its first episode"
        return EnvironmentFailedError(f"{where}: worker process {worker} {how}", slot if began else None)


def _played(episodes: Sequence[Running]) -> int:
    """Steps that bringing slots to where these episodes are takes, a reset counting as one."""
    return sum(1 + len(episode.actions) for episode in episodes)


def plan_moves(owner: Sequence[int], cost: Array, movable: Sequence[int], workers: int) -> dict[int, int]:
    """Which slots should change workers, so that the slowest worker gets faster.

    Greedy descent: between the most and the least loaded worker, do the move or the swap that brings them closest;
    repeat. Nothing moves unless the largest load falls by a twenty-fifth, since a new owner must build the environment.

    Args:
        owner: each slot's worker.
        cost: [slots] seconds per step.
        movable: slots that may move now.
        workers: how many there are.

    Returns:
        ``{slot: new worker}``.
    """
    load = np.bincount(owner, weights=cost, minlength=workers)
    slowest = load.max()
    if not movable or load.mean() >= _WORTHWHILE * slowest:
        return {}
    home = {slot: owner[slot] for slot in movable}
    for _ in movable:
        source, target = int(load.argmax()), int(load.argmin())
        gap = load[source] - load[target]
        leaving = [slot for slot, worker in home.items() if worker == source]
        coming: list[int | None] = [None, *(slot for slot, worker in home.items() if worker == target)]
        pairs = [
            (slot, back, cost[slot] - (0.0 if back is None else cost[back])) for slot in leaving for back in coming
        ]
        pairs = [pair for pair in pairs if 0 < pair[2] < gap]
        if not pairs:
            break
        slot, back, shift = min(pairs, key=lambda pair: abs(pair[2] - gap / 2))
        home[slot] = target
        if back is not None:
            home[back] = source
        load[source] -= shift
        load[target] += shift
    if load.max() >= _WORTHWHILE * slowest:
        return {}
    return {slot: worker for slot, worker in home.items() if worker != owner[slot]}


def main(modules: Sequence[str], memory: int, orders: int, answers: int, parent: int, number: int) -> None:
    """A worker's life: map the memory, take slots, step them when told, end when the parent says so or is gone.

    Args:
        modules: to import before, see ``mtrl.registry.modules``; what cannot be is left to the tasks that need it.
        memory: file descriptor of the shared block.
        orders: file descriptor of the pipe from the parent.
        answers: file descriptor of the pipe to the parent.
        parent: its process id.
        number: which worker this is.
    """
    # The parent alone decides what an interrupt or a termination request means (it may want to save first).
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    link = _Link.of(Connection(orders, writable=False), Connection(answers, readable=False))
    try:
        for name in modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        program: Program = link.reader.recv()
        buffers = Buffers(program, lambda size: mmap.mmap(memory, size))
        with contextlib.closing(Runner(program, buffers, number)) as runner:
            waited = 0.0
            while True:
                waited = link.await_soon(waited)
                order = link.get()
                if order in (_QUIT, b""):
                    break
                if order == _STEP:
                    runner.step()
                    link.put(_DONE)
                elif order == _RESTORE:
                    runner.restore(link.reader.recv())
                    link.put(_DONE)
                elif order == _DROP:
                    runner.drop(link.reader.recv())
                    link.put(_DONE)
    except (EOFError, BrokenPipeError):
        raise SystemExit(1) from None  # the parent is gone
    except Exception as error:
        link.put(_ERROR)
        link.writer.send((getattr(error, "slot", None), str(error), "".join(traceback.format_exception(error))))
        raise SystemExit(1) from error


def _end_with(parent: int) -> None:
    """End this process when the parent is gone, even while an environment hangs.

    The end of the orders is noticed only between steps, and not at all if some other child of the parent inherited
    the pipe; ``PR_SET_PDEATHSIG`` would also fire when merely the thread that made the vector ends.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _shut_down(owner: int, links: list[_Link], processes: list[subprocess.Popen[bytes]], memory: Any) -> None:
    if os.getpid() != owner:
        return  # a forked copy of the owner that exits: the workers are not its own
    for link in links:
        # Said in so many words, since forked children may hold copies of the pipe and so keep it open.
        with contextlib.suppress(BrokenPipeError):
            link.put(_QUIT)
        link.close()
    memory.close()
    deadline = time.monotonic() + _CLOSE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class UnsendableTaskError(ValueError):
    """A task that worker processes cannot be given; the message says why, and what to do."""


def unsendable(task: Task) -> str:
    """Why a task cannot be sent to worker processes; empty if it can."""
    try:
        main_module = b"__main__" in pickle.dumps(task)
    except Exception as error:  # noqa: BLE001 - pickling runs the author's code, which may raise anything
        return (
            f"task {task.name!r} cannot be sent to worker processes: {error}; make its build a class, a "
            "module-level function or a functools.partial of one, or use workers=0"
        )
    if main_module:
        return (
            f"task {task.name!r} is made of things defined in the main script, which worker processes do not "
            "import: move them into a module, or use workers=0"
        )
    return ""


def _pickled(program: Program) -> bytes:
    for task in program.tasks.values():
        if reason := unsendable(task):
            raise UnsendableTaskError(reason)
    return pickle.dumps(program)


def _nameless_file() -> Any:
    """A file in memory that no other process can find, so that nothing is left behind whatever happens."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("mtrl"), "r+b")
    return tempfile.TemporaryFile()


def _extended(file: int, size: int) -> mmap.mmap:
    os.truncate(file, size)
    return mmap.mmap(file, size)
