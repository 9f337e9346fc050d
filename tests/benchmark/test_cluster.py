"""The same grid on a Ray cluster of two nodes on loopback, one of which dies."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mtrl.benchmark import store
from mtrl.benchmark.attempt import BenchmarkError
from mtrl.benchmark.cluster import Ray
from mtrl.benchmark.engine import Local, run_grid
from mtrl.benchmark.progress import Board
from mtrl.benchmark.spec import Spec, parse_spec


def spec() -> Spec:
    return parse_spec(
        {
            "name": "two-nodes",
            "seeds": 2,
            "run": {"steps": 40_000, "checkpoint": {"every": 500}, "log": {"every": 2_000, "wandb": "off"}},
            "suites": ["mtrl.testing:Probes/discrete"],
            "agents": {"random": {"agent": "random"}},
        }
    )


def test_without_ray_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BenchmarkError, match=r"pip install 'mtrl-suite\[ray\]'"):
        run_grid(spec(), tmp_path / "grid", Ray(), Board(Console(quiet=True)))
    assert not (tmp_path / "grid").exists()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one core each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray itself
def test_a_node_dies_and_the_table_is_the_same(tmp_path: Path, cluster: Any) -> None:
    class Events(Board):
        started_jobs: list[str] = []

        def started(self, job: Any) -> None:
            self.started_jobs.append(job.name)

    board = Events(Console(quiet=True))
    second = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)

    def kill() -> None:
        while len(board.started_jobs) < 2 or len(list(tmp_path.glob("ray/runs/*/checkpoints/latest.json"))) < 2:
            time.sleep(0.1)
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    grid = run_grid(spec(), tmp_path / "ray", Ray(), board)
    killer.join(60)
    assert not killer.is_alive(), "the node was not killed while runs went on"
    assert grid.complete, [outcome.reason for outcome in grid.failed]

    assert run_grid(spec(), tmp_path / "local", Local(1), Board(Console(quiet=True))).complete
    tables = [store.load(tmp_path / name).to_csv() for name in ("ray", "local")]
    assert tables[0] == tables[1]
    attempts = [len(path.read_text().split('"started"')) - 1 for path in tmp_path.glob("ray/runs/*/manifest.json")]
    assert sorted(attempts) == [1, 2], "the run of the dead node went on elsewhere"
