"""The live report: on loopback only, and new when a run has written something."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import pytest

from mtrl.benchmark.dashboard import serve

Writer = Callable[..., Path]


@pytest.fixture
def get(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Fetches a path from a dashboard of ``tmp_path``."""
    server = serve(tmp_path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    host, port = server.server_address[:2]
    assert host == "127.0.0.1"
    opener = build_opener(ProxyHandler({}))  # whatever proxy the machine has, loopback needs none

    def fetch(path: str) -> str:
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.read().decode()

    yield fetch
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_page_follows_the_runs(tmp_path: Path, run_writer: Writer, get: Callable[[str], str]) -> None:
    assert "holds no run" in get("/")
    empty = get("/stamp")
    run_writer(tmp_path, "a", "s/x", 0, finished=False)
    begun = get("/stamp")
    assert begun != empty
    assert "No run has finished yet" in get("/")
    run_writer(tmp_path, "b", "s/x", 0)
    ended = get("/stamp")
    assert ended != begun
    page = get("/")
    assert "b has the highest IQM" in page or "Only b has such runs" in page
    assert "connect-src 'self'" in page
    (tmp_path / "runs" / "a--s_x--0" / "manifest.json").write_text('{"status": "failed"}')
    assert get("/stamp") != ended, "a run that fails writes no record"
    with pytest.raises(HTTPError, match="404"):
        get("/runs/a/config.yaml")
