"""The small HTTP servers of a daemon: health, metrics, questions from an operator. GET only."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from pynet.daemon import logs

log = logs.get(__name__)


class Reply(msgspec.Struct, frozen=True):
    """An answer. `headers`: further ones by name."""

    status: int
    content_type: str = "text/plain; charset=utf-8"
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class ByAccept(msgspec.Struct, frozen=True):
    """An answer that depends on the request's header `Accept` ("": there was none)."""

    answer: Callable[[str], Reply]


Routes = Mapping[str, Callable[[], Reply] | ByAccept]
"""Path → answer."""


class BindError(OSError):
    """The address to serve on cannot be had; the message names it and the flag's form."""


def metrics_reply(registry: CollectorRegistry) -> Reply:
    """Return the registry in Prometheus' text form."""
    return Reply(200, CONTENT_TYPE_LATEST, generate_latest(registry))


def address_of(bind: str) -> tuple[str, int]:
    """Return host and port of `host:port`, `[v6]:port` or `:port`. Raise `BindError`."""
    host, colon, port = bind.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise BindError(f"{bind!r} is no address to serve on: expected HOST:PORT, as in 127.0.0.1:10256 or [::]:10256")
    return host.strip("[]"), int(port)


class Server:
    """A running server; it answers from threads of its own until `close`."""

    def __init__(self, bind: str, routes: Routes) -> None:
        host, port = address_of(bind)
        family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
        try:
            self._server = _listen(host, port, family, routes)
        except OSError as error:
            raise BindError(f"cannot serve on {bind}: {error.strerror or error}") from None
        self._thread = threading.Thread(target=self._server.serve_forever, name=f"http {bind}", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port in use (the port that the kernel chose, where 0 was asked for)."""
        name = self._server.server_address
        return str(name[0]), int(name[1])

    def close(self) -> None:
        """Stop answering and free the port."""
        # wakes the server's loop, which looks for the word to end only every half second
        with contextlib.suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve(bind: str, routes: Routes) -> Server | None:
    """Serve `routes` (path → answer) on `bind` = "host:port"; an empty `bind` serves nothing. Raise `BindError`."""
    return Server(bind, routes) if bind else None


def _listen(host: str, port: int, family: int, routes: Routes) -> ThreadingHTTPServer:
    class Listener(ThreadingHTTPServer):
        address_family = family
        daemon_threads = True
        request_queue_size = 64

        def server_bind(self) -> None:
            if self.address_family == socket.AF_INET6 and host in ("", "::"):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            # else a restart must wait for the predecessor's connections to leave TIME_WAIT
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(self.server_address)
            self.server_address = self.socket.getsockname()
            self.server_name, self.server_port = host, int(self.server_address[1])

        def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
            log.debug("client went away", extra=logs.fields(client=client_address), exc_info=True)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_GET(self) -> None:
            answer = routes.get(urlsplit(self.path).path)
            try:
                if isinstance(answer, ByAccept):
                    reply = answer.answer(", ".join(self.headers.get_all("Accept", ())))
                else:
                    reply = answer() if answer else Reply(404, body=b"not found\n")
            except Exception:
                log.exception("answering failed", extra=logs.fields(path=self.path))
                reply = Reply(500, body=b"internal error; see the log\n")
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            self.send_header("Content-Length", str(len(reply.body)))
            for name, value in reply.headers:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            log.debug("request", extra=logs.fields(line=format % args))

    return Listener((host, port), Handler)
