"""The process: it listens, and on SIGTERM lets requests end before it does."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from types import FrameType

import uvicorn

from kvpress.serve.app import App
from kvpress.serve.service import Service

log = logging.getLogger("kvpress.serve")
GRACE = 5.0  # seconds in which answers that were cancelled are written out
KEEP_ALIVE = 30  # seconds that a connection without a request is kept


class Server(uvicorn.Server):
    """uvicorn, whose first SIGTERM or SIGINT only begins to drain; a second one ends it at once.

    While it drains it listens on, so that clients and proxies are told to go elsewhere.
    """

    def __init__(self, service: Service, drain: float) -> None:
        super().__init__(
            uvicorn.Config(
                App(service),
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # it would log whatever stands behind a path
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(GRACE),
            )
        )
        self._service, self._seconds = service, drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of signals."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
            return
        log.info("%s: taking no more requests", signal.Signals(sig).name)
        self._service.draining = True
        threading.Thread(target=self._drain, name="kvpress-drain", daemon=True).start()

    def _drain(self) -> None:
        """Waits for what runs, then ends it, then the server."""
        ended = time.monotonic() + self._seconds
        try:
            self._service.batcher.drain(self._seconds)
            self._wait(ended)
            if self._service.feeds:
                log.info("%s requests are cancelled", len(self._service.feeds))
                for feed in list(self._service.feeds):
                    feed.cancel()
                self._wait(time.monotonic() + GRACE)
        finally:
            self.should_exit = True

    def _wait(self, until: float) -> None:
        """For answers that are still being written."""
        while self._service.feeds and time.monotonic() < until:
            time.sleep(0.05)


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError:
        found.close()
        raise
    return found


def run(service: Service, bound: socket.socket, drain: float) -> None:
    """Serves until it is told to end. drain: seconds for requests that run then."""
    try:
        Server(service, drain).run([bound])
    finally:
        service.batcher.close()
