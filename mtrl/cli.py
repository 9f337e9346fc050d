"""The command line: ``mtrl train | evaluate | watch | benchmark | results | report | list | check | doctor | export``.

Every command is a few lines over the public functions; ``scripts/`` holds the same as plain scripts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mtrl import registry, tables

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multi-task reinforcement learning: train, evaluate, plug in.",
)
console = Console()


def _show_versions(wanted: bool) -> None:
    if wanted:
        from mtrl.checkpoint import versions

        console.print("\n".join(f"{name} {found}" for name, found in versions().items()), markup=False, highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_versions, is_eager=True, help="print what results depend on"),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``mtrl`` command."""
    # "module:Attr" may name a module in the current folder: ``python -m`` finds it, an installed command does not.
    sys.path.insert(0, os.getcwd())
    app()


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # a disk is, or may not be written to


@contextlib.contextmanager
def _friendly() -> Iterator[None]:
    """A user's mistake is one clear line and exit status 2; anything else keeps its traceback."""
    from mtrl.benchmark.attempt import BenchmarkError
    from mtrl.checkpoint import CheckpointError
    from mtrl.config import ConfigError
    from mtrl.runs import RunError
    from mtrl.spaces import SpaceError
    from mtrl.vector import EnvironmentFailedError, RenderError
    from mtrl.vector.workers import UnsendableTaskError
    from mtrl.video import GifTooLongError
    from mtrl.watch import WatchError

    mistakes = (BenchmarkError, ConfigError, RunError, SpaceError, registry.MixError, registry.UnknownNameError)
    films = (GifTooLongError, RenderError, WatchError)
    played = (EnvironmentFailedError, UnsendableTaskError)
    known = (*mistakes, *films, *played, CheckpointError, FloatingPointError, MemoryError, registry.MissingPackageError)
    try:
        yield
    except (*known, OSError) as error:
        places = (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)  # that the user named
        if isinstance(error, OSError) and not isinstance(error, (*known, *places)) and error.errno not in _FULL:
            raise
        named = isinstance(error, OSError) and error.filename
        what = f"cannot use {error.filename}: {error.strerror}" if named else str(error)  # type: ignore[attr-defined]
        # Not as markup: "pip install 'mtrl-suite[sweep]'" would lose its extra.
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {what}"), soft_wrap=True)
        raise typer.Exit(2) from None


def _whole(text: str) -> int:
    """A whole number, also one like 1e6."""
    try:
        value = Decimal(text)
        if value == value.to_integral_value():
            return int(value)
    except ArithmeticError:
        pass
    raise typer.BadParameter(f"{text!r} is no whole number")


@app.command()
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [key=value ...]", help="config file; overrides, which win"),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="'suite/group' parts joined by '+', each with '*N' for N copies of its tasks")
    ] = None,
    agent: Annotated[str | None, typer.Option(help="see: mtrl list agents")] = None,
    steps: Annotated[
        int | None, typer.Option(parser=_whole, metavar="INTEGER", help="environment steps over all tasks, as 1e6, too")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="decides everything random")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; default runs/AGENT-SUITE-SEED")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with the run in this folder, bit for bit")] = None,
) -> None:
    """Train an agent. Interrupt it at any time and go on with --resume."""
    from mtrl import runs
    from mtrl.config import ConfigError, load_config, parse_config
    from mtrl.train import train as run

    with _friendly():
        if resume is not None:
            if words or suite or agent or seed is not None or out:
                raise ConfigError("--resume continues a run as it was started: only --steps may be given with it")
            config = runs.config_of(resume)
            if steps is not None:
                config = parse_config({**config.model_dump(mode="json"), "steps": steps})
            folder = resume
        else:
            files = [word for word in words or [] if "=" not in word or _is_file(word)]
            if len(files) > 1:
                raise ConfigError(f"one config file at most, got {', '.join(files)}")
            overrides = [word for word in words or [] if word not in files]
            path = Path(files[0]) if files else None
            config = load_config(path, overrides, suite=suite, agent=agent, steps=steps, seed=seed)
            name = f"{config.agent['kind']}-{config.suite}-{config.seed}"
            folder = out or Path("runs") / _plain(name)
        if config.eval.video:
            _choose_gl()
        summary = run(config, folder, resume=resume is not None)
    if summary.evaluation is not None:
        console.print(tables.evaluation(summary.evaluation))
        console.print(f"run folder: {folder}", soft_wrap=True, markup=False)
    if summary.signal is not None:
        go_on = shlex.join(["mtrl", "train", "--resume", str(folder)])
        console.print(f"interrupted at step {summary.steps}; go on with: {go_on}", soft_wrap=True, markup=False)
        raise typer.Exit(128 + summary.signal)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run or of an exported policy")],
    episodes: Annotated[int, typer.Option(min=1, help="seeded episodes per task")] = 50,
    seed: Annotated[int | None, typer.Option(min=0, help="evaluation seed; default: the run's")] = None,
    step: Annotated[int | None, typer.Option(help="checkpoint; default: the newest")] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="sample actions instead of taking the mode")] = False,
    workers: Annotated[int | None, typer.Option(min=0, help="worker processes; default: as the run says")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print every episode as JSON")] = False,
    video: Annotated[bool, typer.Option("--video", help="write best and worst episode of each task")] = False,
) -> None:
    """Evaluate a trained agent on fresh environments."""
    from mtrl import runs
    from mtrl.evaluate import evaluate as play

    with _friendly():
        if video:
            _choose_gl()
        config = runs.config_of(run)
        runs.set_up_torch(runs.here(config))
        policy = runs.load(run, step)
        found = play(
            policy.agent,
            policy.tasks,
            spec=policy.spec,
            episodes=episodes,
            seed=config.eval.seed if seed is None else seed,
            explore=sampled,
            workers=config.workers if workers is None else workers,
            patience=config.patience,
        )
        for fault in found.faults:
            Console(stderr=True).print(f"replaced a worker: {fault.splitlines()[0]}", markup=False)
        if as_json:
            typer.echo(json.dumps({"step": policy.step, **found.as_dict()}))
        else:
            console.print(tables.evaluation(found))
        if video:
            from mtrl.watch import record

            for path in record(found, run / runs.VIDEOS, step=policy.step):
                Console(stderr=True).print(f"wrote {path}", markup=False)


@app.command()
def watch(
    run: Annotated[Path | None, typer.Argument(help="folder of a run or of an exported policy")] = None,
    suite: Annotated[str | None, typer.Option(help="instead of a run: tasks for an untrained agent")] = None,
    agent: Annotated[str, typer.Option(help="the untrained agent")] = "random",
    training: Annotated[str | None, typer.Option(help="training episodes of the run: best, worst or last")] = None,
    pick: Annotated[str, typer.Option(help="of the episodes played: all, best, worst or last")] = "all",
    episodes: Annotated[
        int | None, typer.Option(min=1, help="per task; default: 1, and with --pick as many as an evaluation has")
    ] = None,
    tasks: Annotated[str, typer.Option(help="only these, as in reach-v3,minigrid/LavaGapS7")] = "",
    seed: Annotated[int | None, typer.Option(min=0, help="evaluation seed; default: the run's")] = None,
    step: Annotated[int | None, typer.Option(help="checkpoint; default: the newest")] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="sample actions instead of taking the mode")] = False,
    out: Annotated[Path | None, typer.Option(help=".mp4 or .gif; default: in the run's folder, or in videos/")] = None,
    fps: Annotated[float, typer.Option(min=1, max=120, help="pictures per second")] = 15,
    height: Annotated[int, typer.Option(min=32, max=1080, help="pixels of a task's picture")] = 224,
    max_frames: Annotated[int, typer.Option(min=2, help="pictures per episode; a longer one is shown faster")] = 300,
) -> None:
    """Write one video of several tasks at once: seeded episodes of an agent, or episodes of its training."""
    from rich.progress import Progress

    from mtrl import runs
    from mtrl import watch as films
    from mtrl.config import ConfigError, load_config

    with _friendly():
        if (run is None) == (suite is None):
            raise ConfigError("name the folder of a run, or tasks for an untrained agent with --suite: one of the two")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        label = (f"training-{training}" if training else pick) + ("-sampled" if sampled else "")
        folder, name = (run / "watch", label) if run else (Path("videos"), f"{agent}-{suite}-{label}")
        path = out or folder / f"{_plain(name)}.mp4"
        films.check_format(path)
        _choose_gl()
        if training is None:
            if run is not None:
                runs.set_up_torch(runs.here(runs.config_of(run)))
            options: dict[str, Any] = {"episodes": episodes, "seed": seed, "step": step, "explore": sampled}
            reels = films.played(run or load_config(suite=suite, agent=agent), pick, names, **options)
        elif run is None or sampled or pick != "all" or (episodes, seed, step) != (None, None, None):
            raise ConfigError("--training shows what a run has recorded: of the options, only --tasks chooses from it")
        else:
            reels = films.training(run, training, names)
        screen = Console(stderr=True)
        with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
            drawing = bar.add_task("drawing")
            settings: dict[str, Any] = {"fps": fps, "height": height, "max_frames": max_frames}
            films.film(reels, path, **settings, progress=lambda n, of: bar.update(drawing, completed=n, total=of))
    console.print(tables.episodes(reels))
    console.print(f"wrote {path}", soft_wrap=True, markup=False)


@app.command()
def benchmark(
    spec: Annotated[Path, typer.Argument(help="what to compare, as in configs/benchmark/")],
    out: Annotated[Path, typer.Option(help="folder of the grid")],
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at once; default: as many as the cores allow")] = None,
    engine: Annotated[str, typer.Option(help="local: processes on this machine; ray: a Ray cluster")] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="go on with the grid in --out; finished runs stay")] = False,
) -> None:
    """Compare agents: agents x suites x seeds. Interrupt it at any time and go on with --resume."""
    from mtrl.benchmark import store
    from mtrl.benchmark.cluster import Ray
    from mtrl.benchmark.engine import Local, run_grid
    from mtrl.benchmark.progress import Board
    from mtrl.benchmark.report import REPORT, write_report
    from mtrl.benchmark.spec import load_spec

    with _friendly():
        if engine not in ("local", "ray"):
            raise registry.UnknownNameError("engine", engine, ("local", "ray"))
        chosen = Local(jobs) if engine == "local" else Ray()
        grid = run_grid(load_spec(spec), out, chosen, Board(console), resume=resume)
    more = [*(["--jobs", str(jobs)] if jobs else []), *(["--engine", engine] if engine != "local" else []), "--resume"]
    go_on = shlex.join(["mtrl", "benchmark", str(spec), "--out", str(out), *more])
    if grid.signal is not None:
        console.print(f"interrupted; go on with: {go_on}", soft_wrap=True, markup=False)
        raise typer.Exit(128 + grid.signal)
    if not grid.complete:
        ended = f"{len(grid.failed)} of {grid.total} runs failed" if grid.failed else "not all runs are finished"
        console.print(f"{ended}; mend the cause and go on with: {go_on}", soft_wrap=True, markup=False)
    with _friendly():
        found = store.load(out)
        for path in (*store.write_tables(found), write_report(found, out / REPORT)):
            console.print(f"wrote {path}", soft_wrap=True, markup=False)
    if not grid.complete:
        raise typer.Exit(1)


@app.command()
def sweep(
    spec: Annotated[Path, typer.Argument(help="a benchmark spec with a sweep part")],
    out: Annotated[Path, typer.Option(help="folder of the search; one that exists is gone on with")],
    jobs: Annotated[int | None, typer.Option(min=1, help="runs at once; default: as many as the cores allow")] = None,
) -> None:
    """Search for better hyperparameters of one agent over a benchmark's suites and seeds."""
    from mtrl.benchmark import sweep as search
    from mtrl.benchmark.engine import Local, run_grid
    from mtrl.benchmark.progress import Board
    from mtrl.benchmark.spec import load_spec

    with _friendly():
        found = search.sweep(
            load_spec(spec), out, lambda grown: run_grid(grown, out, Local(jobs), Board(console), resume=True)
        )
    if found.label is not None:
        values = " ".join(f"{name}={value}" for name, value in found.values.items())
        console.print(
            f"best of {found.trials} trials: {found.label}, IQM {found.score:.3f}: {values}",
            soft_wrap=True,
            markup=False,
        )
    console.print(f"all of them: {shlex.join(['mtrl', 'report', str(out)])}", soft_wrap=True, markup=False)
    if not found.complete:
        go_on = shlex.join(["mtrl", "sweep", str(spec), "--out", str(out), *(["--jobs", str(jobs)] if jobs else [])])
        console.print(f"not complete; go on with: {go_on}", soft_wrap=True, markup=False)
        raise typer.Exit(1)


@app.command()
def results(
    folder: Annotated[Path, typer.Argument(help="a grid, a folder of runs, one run, or kept results")],
    sampled: Annotated[bool, typer.Option("--sampled", help="evaluations with sampled actions")] = False,
    step: Annotated[
        int | None, typer.Option(parser=_whole, metavar="INTEGER", help="as of the evaluations after so many steps")
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="also P(A > B) of every pair of agents")] = False,
    curves: Annotated[
        Path | None, typer.Option("--import", help="CSV of step,task,seed,score, or an offline W&B run")
    ] = None,
    agent: Annotated[str | None, typer.Option(help="what to call the imported agent; default: the file's name")] = None,
    suite: Annotated[str | None, typer.Option(help="that the imported curves belong to, if it cannot be told")] = None,
) -> None:
    """Print the table of results; write results.csv and runs.csv for pandas, polars or a spreadsheet.

    Kept results and those of --step are only printed.
    """
    from mtrl.benchmark import keep as kept
    from mtrl.benchmark import store
    from mtrl.benchmark.analysis import analyse
    from mtrl.benchmark.attempt import BenchmarkError
    from mtrl.benchmark.tables import terminal
    from mtrl.benchmark.wandb_files import restore

    actions = "sampled" if sampled else "greedy"
    with _friendly():
        if curves is not None:
            if kept.is_kept(folder):
                raise BenchmarkError(f"{folder} holds kept results: import into the folder of the runs, then keep that")
            if curves.suffix == ".csv":
                path = store.import_curves(folder, curves, agent=agent, suite=suite)
            else:
                path = restore(curves, folder, agent)
            console.print(f"wrote {path}", soft_wrap=True, markup=False)
        found = kept.read(folder)
        shown = found if step is None else kept.after(found, step, actions)
        console.print(terminal(analyse(shown, actions), pairs))
        for path in store.write_tables(found) if step is None and not kept.is_kept(folder) else ():
            console.print(f"wrote {path}", soft_wrap=True, markup=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a grid, a folder of runs, one run, or kept results")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="HTML file; default: FOLDER/report.html")] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="evaluations with sampled actions")] = False,
    videos: Annotated[bool, typer.Option(help="embed the best and worst episodes that were filmed")] = True,
    paper: Annotated[Path | None, typer.Option(help="folder for Markdown and LaTeX tables, SVG and PNG plots")] = None,
) -> None:
    """Write one self-contained HTML file: who is better, on what, how sure, at what cost, and how to rerun it."""
    from mtrl.benchmark.keep import read
    from mtrl.benchmark.report import REPORT, write_report

    with _friendly():
        actions = "sampled" if sampled else "greedy"
        found = read(folder)
        written = [write_report(found, out or folder / REPORT, actions=actions, videos=videos)]
        if paper is not None:
            from mtrl.benchmark.paper import write_paper

            written += write_paper(found, paper, actions=actions)
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, markup=False)


@app.command()
def keep(
    folders: Annotated[list[Path], typer.Argument(help="grids, folders of runs, or kept results")],
    out: Annotated[Path, typer.Option(help="folder of the small files; runs that it holds already stay")],
) -> None:
    """Keep the results of grids, finished or not, as a few small files: every evaluation, settings, tables, plots."""
    from mtrl.benchmark.keep import keep as write

    with _friendly():
        for path in write(folders, out, shlex.join(["mtrl", "keep", *map(str, folders), "--out", str(out)])):
            console.print(f"wrote {path}", soft_wrap=True, markup=False)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs")],
    out: Annotated[Path, typer.Option("--out", "-o", help="file that ends in .svg, .html or .png")],
) -> None:
    """Plot what happens inside networks: use and likeness of experts, ranks, dormant units, gradient conflicts."""
    from mtrl.benchmark.inside import plot as write

    with _friendly():
        console.print(f"wrote {write(runs, out)}", soft_wrap=True, markup=False)


@app.command()
def dashboard(
    folder: Annotated[Path, typer.Argument(help="folder of a grid, also one that is running")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8734,
) -> None:
    """Serve the live report on this machine (loopback only) while runs go on."""
    from mtrl.benchmark.attempt import BenchmarkError
    from mtrl.benchmark.dashboard import serve

    with _friendly():
        try:
            server = serve(folder, port)
        except OSError as error:
            raise BenchmarkError(f"port {port}: {error.strerror or error}; choose another with --port") from error
    console.print(
        f"http://127.0.0.1:{server.server_address[1]}/ shows {folder}; Ctrl-C ends it", soft_wrap=True, markup=False
    )
    with contextlib.suppress(KeyboardInterrupt), server:
        server.serve_forever()


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="suites, agents, tasks or settings")],
    name: Annotated[str | None, typer.Argument(help="tasks: 'suite/group'; settings: an agent; none: a run's")] = None,
) -> None:
    """List what is installed: suites, agents, the tasks of a suite's group; or the settings of an agent or a run."""
    with _friendly():
        listed = {
            "suites": tables.suites,
            "agents": tables.agents,
            "tasks": lambda: tables.tasks(str(name)),
            "settings": lambda: tables.settings(name),
        }
        if what not in listed:
            raise registry.UnknownNameError("thing to list", what, tuple(listed))
        if what == "tasks" and name is None:
            raise registry.MixError(
                "name a suite and a group, as in: mtrl list tasks minigrid/mt3; see mtrl list suites"
            )
        console.print(listed[what]())


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="'suite/group', also 'module:Attr/group'; or a mix of them")],
    full: Annotated[bool, typer.Option("--full", help="whole episodes and more seeds")] = False,
) -> None:
    """Check a suite against the contract and say exactly what is wrong."""
    from mtrl.testing import check_suite

    with _friendly():
        reports = []
        for part in registry.parts(name):
            found = registry.suite(part.suite)
            reports.append(check_suite(found, part.group or found.groups[0], full=full))
    for report in reports:
        console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if all(report.ok for report in reports) else 1)


@app.command()
def doctor() -> None:
    """Look at this machine: packages, rendering, Weights & Biases, cores, GPU; says what to mend."""
    from mtrl.doctor import report

    console.print(report(), markup=False, highlight=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    target: Annotated[Path, typer.Argument(help="new folder for the policy")],
    step: Annotated[int | None, typer.Option(help="checkpoint; default: the newest")] = None,
) -> None:
    """Write the policy alone, without optimiser and memory; load it with mtrl.load(TARGET)."""
    from mtrl import runs

    with _friendly():
        console.print(f"wrote {runs.export(run, target, step)}", soft_wrap=True, markup=False)


def _is_file(word: str) -> bool:
    """Whether a word with an equals sign is a config file."""
    return word.endswith((".yaml", ".yml")) and Path(word).is_file()


def _plain(name: str) -> str:
    """A file name out of the name of a suite."""
    return name.replace("/", "_").replace("+", "_").replace(":", "_").replace("*", "x")


def _choose_gl() -> None:
    """MuJoCo picks its GL backend when it is imported, so it is chosen here, before any suite is."""
    if "MUJOCO_GL" not in os.environ and "mujoco" not in sys.modules and not os.environ.get("DISPLAY"):
        from mtrl.doctor import choose_gl

        backend = choose_gl()
        if backend is not None:
            os.environ["MUJOCO_GL"] = backend


if __name__ == "__main__":
    main()
