"""The server: what listens, and starts and stops; who asks is served by `handler`, from `api` and `store`."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from apiserver import allocation
from apiserver.api import Api
from apiserver.faults import Script
from apiserver.handler import Handler, Request
from apiserver.resources import BY_PATH
from apiserver.store import Store

Json = dict[str, Any]


@dataclass(frozen=True)
class Tls:
    """Files of a server with TLS; `clients`: the authority whose clients are known by their certificates."""

    certificate: Path
    key: Path
    clients: Path | None = None


class Server:
    """A running API server. `faults` is its script, `requests` the record, `api` and `store` what is behind it."""

    def __init__(
        self,
        store: Store | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Tls | None = None,
        tokens: set[str] | Mapping[str, str] | None = None,
        service_ranges: tuple[str, ...] = ("10.96.0.0/16",),
        bookmark_every: float = 60.0,
        streaming: bool = True,
        field_selectors: bool = True,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        """`sockets`: listening ones that are served as well, from whichever network namespace they are of.

        `tokens`: bearer tokens that are let in (None: everybody is), a mapping says as whom: then the cluster's roles
        say what each may do (`authorization`). `streaming`: streaming lists are offered.
        """
        self.store = store or Store()
        self.api = Api(self.store, allocation.Allocator(service_ranges))
        self.faults = Script()
        self.requests: list[Request] = []
        self.tokens = tokens
        self.bookmark_every = bookmark_every
        self.streaming = streaming
        self.field_selectors = field_selectors
        self.tls = tls
        self.host, self.port = host, port
        self._sockets = sockets
        self._listeners: list[Listener] = []
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether it listens."""
        return bool(self._listeners)

    def serves(self, listener: ThreadingHTTPServer) -> bool:
        """Whether a listener is one of those that serve now."""
        return listener in self._listeners

    def start(self) -> None:
        """Listen (again, on the same port)."""
        if self._listeners:
            return
        first = Listener(self)
        self.port = first.server_address[1]
        self._listeners = [first, *(Listener(self, sock.dup()) for sock in self._sockets)]
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.05,), name="apiserver", daemon=True).start()

    def stop(self) -> None:
        """End every connection, and listen no more; objects and history stay."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.shutdown()
            listener.server_close()
            listener.drop()
        with self.store.changed:
            self.store.changed.notify_all()

    def drop_connections(self) -> None:
        """Cut every connection; new ones are taken."""
        for listener in self._listeners:
            listener.drop()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def put(self, *objects: Json) -> None:
        """Store objects as they are (see `Api.put`)."""
        for obj in objects:
            self.api.put(obj)

    def delete(self, obj: Json) -> None:
        """Delete an object at once."""
        resource = next(r for r in BY_PATH.values() if r.kind == obj["kind"])
        namespace = obj["metadata"].get("namespace", "default") if resource.namespaced else ""
        self.api.delete(resource, namespace, obj["metadata"]["name"], {"gracePeriodSeconds": 0})

    def kubeconfig(self, *, token: str = "", user: Json | None = None, cluster: Json | None = None) -> str:
        """Return a kubeconfig for this server, as text."""
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "lab", "cluster": {"server": self.url, **(cluster or {})}}],
                "users": [{"name": "lab", "user": user or ({"token": token} if token else {})}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab", "namespace": "default"}}],
                "current-context": "lab",
            }
        )


class Listener(ThreadingHTTPServer):
    """One listening socket and the connections that came in by it."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, server: Server, ready: socket.socket | None = None) -> None:
        self.owner = server
        self.open: set[socket.socket] = set()
        self.lock = threading.Lock()
        if ":" in server.host:
            self.address_family = socket.AF_INET6
        self.context: ssl.SSLContext | None = None
        if server.tls:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(server.tls.certificate, server.tls.key)
            if server.tls.clients:
                self.context.verify_mode = ssl.CERT_OPTIONAL
                self.context.load_verify_locations(server.tls.clients)
        super().__init__((server.host, server.port), Handler, bind_and_activate=ready is None)
        if ready is not None:
            self.socket.close()
            self.socket = ready

    def server_bind(self) -> None:
        """Bind, without asking a name server who we are."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection, with TLS where that is wanted."""
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.context:
            request = self.context.wrap_socket(request, server_side=True)
        with self.lock:
            self.open.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            with self.lock:
                self.open.discard(request)
            with contextlib.suppress(OSError):
                request.close()

    def drop(self) -> None:
        """Cut every connection."""
        with self.lock:
            connections = list(self.open)
        for connection in connections:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a connection that broke."""
