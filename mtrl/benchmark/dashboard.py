"""The report of a grid that is still running, served on this machine and drawn anew when something changed."""

from __future__ import annotations

import threading
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mtrl.benchmark import store
from mtrl.benchmark.analysis import analyse
from mtrl.benchmark.attempt import MANIFEST, RUNS, BenchmarkError
from mtrl.benchmark.report import render
from mtrl.log import METRICS
from mtrl.runs import SUMMARY

POLL_SECONDS = 5
# Asks for the stamp only; what the reader chose stays as it is until there is something new.
_LIVE = f"""
(() => {{
  let known = null;
  setInterval(async () => {{
    const answer = await fetch("stamp").catch(() => null);
    if (answer === null || !answer.ok) return;
    const stamp = await answer.text();
    if (known !== null && stamp !== known) location.reload();
    known = stamp;
  }}, {POLL_SECONDS * 1000});
}})();
"""


def serve(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of the live report on the loopback interface; run its ``serve_forever``.

    Args:
        folder: of the grid; may still be empty.
        port: 0 takes a free one; ``server.server_address`` says which.

    Raises:
        OSError: the port is taken.
    """
    page = _Page(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match self.path:
                case "/":
                    self._answer(page.html(), "text/html; charset=utf-8")
                case "/stamp":
                    self._answer(page.stamp(), "text/plain")
                case _:
                    self.send_error(HTTPStatus.NOT_FOUND)

        def _answer(self, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing: the terminal belongs to the user."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


class _Page:
    """The newest report, made again only when a record file has changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._made: tuple[str, str] = ("", "")

    def stamp(self) -> str:
        """Changes when a run has a new record or another status."""
        places = ("", "*/", f"{RUNS}/*/")
        files = (METRICS, MANIFEST, SUMMARY)
        paths = [path for place in places for name in files for path in self._folder.glob(place + name)]
        return f"{len(paths)}-{max((path.stat().st_mtime_ns for path in paths), default=0)}"

    def html(self) -> str:
        with self._lock:
            stamp = self.stamp()
            if self._made[0] != stamp:
                try:
                    text = render(analyse(store.load(self._folder)), live=_LIVE)
                except BenchmarkError as error:
                    text = f"<!doctype html><title>mtrl</title><p>{escape(str(error))}</p><script>{_LIVE}</script>"
                self._made = (stamp, text)
            return self._made[1]
