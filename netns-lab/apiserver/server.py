"""The server: HTTP in front of `api` and `watching`, with authentication, faults, and a record of what was asked."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
import yaml

from apiserver import discovery, errors, protobuf, selectors, services, tables, watching
from apiserver.api import Api, scale_of
from apiserver.errors import ApiError
from apiserver.faults import Fault, Script
from apiserver.resources import BY_PATH, Resource
from apiserver.store import Store, Stored

Json = dict[str, Any]
_JSON = "application/json"
_PATH = re.compile(
    r"^(?P<base>/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+)(?=/[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<part>status|scale))?)?$"
)
_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True)
class Request:
    """What was asked, as an authoriser would see it."""

    verb: str
    group: str
    plural: str
    namespace: str
    name: str
    part: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


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
        tokens: set[str] | None = None,
        service_ranges: tuple[str, ...] = ("10.96.0.0/16",),
        bookmark_every: float = 60.0,
        streaming: bool = True,
        field_selectors: bool = True,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        """`sockets`: listening ones that are served as well, from whichever network namespace they are of.

        `tokens`: bearer tokens that are let in (None: everybody is). `streaming`: streaming lists are offered.
        """
        self.store = store or Store()
        self.api = Api(self.store, services.Allocator(service_ranges))
        self.faults = Script()
        self.requests: list[Request] = []
        self.tokens = tokens
        self.bookmark_every = bookmark_every
        self.streaming = streaming
        self.field_selectors = field_selectors
        self.tls = tls
        self.host, self.port = host, port
        self._sockets = sockets
        self._listeners: list[_Listener] = []
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
        first = _Listener(self)
        self.port = first.server_address[1]
        self._listeners = [first, *(_Listener(self, sock.dup()) for sock in self._sockets)]
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


class _Listener(ThreadingHTTPServer):
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
        super().__init__((server.host, server.port), _Handler, bind_and_activate=ready is None)
        if ready is not None:
            self.socket.close()
            self.socket = ready

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)

    def finish_request(self, request: Any, client_address: Any) -> None:
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
        with self.lock:
            connections = list(self.open)
        for connection in connections:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET  # noqa: N815 (the names that http.server calls)

    def _handle(self) -> None:
        self.owner = self.server.owner
        split = urlsplit(self.path)
        self.query = dict(parse_qsl(split.query, keep_blank_values=True))
        length = int(self.headers.get("Content-Length") or 0)
        self.raw = self.rfile.read(length) if length else b""
        try:
            self._authenticate()
            self._route(split.path)
        except ApiError as error:
            self._send(error.code, error.status(), error.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        self.wfile.flush()

    def _authenticate(self) -> None:
        if self.owner.tokens is None:
            return
        if isinstance(self.connection, ssl.SSLSocket) and self.connection.getpeercert():
            return
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or token.strip() not in self.owner.tokens:
            raise errors.unauthorized()

    def _route(self, path: str) -> None:
        match = _PATH.match(path)
        resource = BY_PATH.get((match["base"], match["plural"])) if match else None
        if match is None or resource is None:
            self._describe(path)
            return
        namespace, name, part = match["namespace"] or "", match["name"] or "", match["part"] or ""
        watch = self.query.get("watch") in ("true", "1")
        verb = _VERBS.get(self.command, self.command)
        if not name:
            verb = {"get": "watch" if watch else "list", "delete": "deletecollection"}.get(verb, verb)
        elif watch:
            verb = "watch"
        asked = Request(
            verb, resource.group, resource.plural, namespace, name, part, self.path, self.query, dict(self.headers)
        )
        self.owner.requests.append(asked)
        fault = self.owner.faults.next(resource.plural, verb)
        if fault is not None:
            if fault.delay:
                time.sleep(fault.delay)
            if fault.hang:
                self._hang()
                return
            if fault.error is not None:
                raise fault.error
        if verb == "watch":
            self._watch(resource, namespace, name, fault)
        elif verb == "list":
            self._list(resource, namespace)
        else:
            self._one(resource, namespace, name, part, verb)

    def _describe(self, path: str) -> None:
        accept = self.headers.get("Accept") or ""
        address = self.owner.url.partition("://")[2]
        base = path.removeprefix("/openapi/v3")
        body: Json | None
        if path in ("/api", "/apis") and "as=APIGroupDiscoveryList" in accept and "v=v2;" in accept + ";":
            kind = f"{_JSON};g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
            self._send(200, discovery.aggregated(core=path == "/api"), {"Content-Type": kind})
            return
        if path in ("/healthz", "/livez", "/readyz"):
            self._send_bytes(200, b"ok", {"Content-Type": "text/plain; charset=utf-8"})
            return
        if path == "/api":
            body = discovery.api_versions(address)
        elif path == "/apis":
            body = discovery.group_list()
        elif path == "/version":
            body = discovery.VERSION
        elif path == "/openapi/v3":
            body = discovery.openapi_index()
        elif path.startswith("/openapi/v3/"):
            body = discovery.openapi(base)
        elif path.count("/") == 2 and path.startswith("/apis/"):
            body = discovery.group(path.rpartition("/")[2])
        else:
            body = discovery.resource_list(path)
        if body is None:
            raise errors.no_such_path()
        self._send(200, body)

    def _selected(self, resource: Resource, name: str = "") -> selectors.Predicate:
        fields = self.query.get("fieldSelector", "")
        if fields and not self.owner.field_selectors and not fields.startswith("metadata."):
            raise errors.bad_request(f"field label not supported: {re.split('[!=]', fields)[0]}")
        if name:
            fields = f"{fields},metadata.name={name}".lstrip(",")
        chosen = selectors.fields(fields, resource)
        return selectors.both(selectors.labels(self.query.get("labelSelector", "")), chosen)

    def _list(self, resource: Resource, namespace: str) -> None:
        selected = self._selected(resource)
        limit = int(self.query.get("limit") or 0)
        version, first = None, ""
        text = self.query.get("resourceVersion", "")
        if token := self.query.get("continue"):
            version, first = watching.page_start(token)
        elif text not in ("", "0"):
            watching.begin(self.owner.store, {"resourceVersion": text})
            if self.query.get("resourceVersionMatch") == "Exact":
                version = int(text)
        version, found = self.owner.store.snapshot(resource, namespace, selected, version)
        if first:
            found = [pair for pair in found if pair[0] >= first]
        meta: Json = {"resourceVersion": str(version)}
        if limit and len(found) > limit:
            meta["continue"] = watching.page_token(version, found[limit - 1][0])
            if selected is selectors.everything:
                meta["remainingItemCount"] = len(found) - limit
            found = found[:limit]
        if self._wants_table():
            objects = [stored.obj for _, stored in found]
            self._send(200, tables.table(resource, objects, meta, self.query.get("includeObject", "Metadata")))
            return
        text_meta = msgspec.json.encode(meta)
        items = b",".join(stored.item for _, stored in found)
        opening = f'{{"kind":"{resource.list_kind}","apiVersion":"{resource.api_version}","metadata":'.encode()
        self._send_bytes(200, opening + text_meta + b',"items":[' + items + b"]}\n", {})

    def _wants_table(self) -> bool:
        return "as=Table" in (self.headers.get("Accept") or "")

    def _one(self, resource: Resource, namespace: str, name: str, part: str, verb: str) -> None:
        api = self.owner.api
        dry = "dryRun" in self.query
        strict = self.query.get("fieldValidation") == "Strict"
        code = 200
        if verb == "get":
            obj = api.store.get(resource, namespace, name)
        elif verb == "create":
            code, obj = 201, api.create(resource, namespace, self._body(), dry=dry, strict=strict)
        elif verb == "update":
            obj = api.update(resource, namespace, name, self._body(), part=part, dry=dry, strict=strict)
        elif verb == "patch":
            kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip()
            manager = self.query.get("fieldManager", "")
            obj, new = api.patch(
                resource, namespace, name, kind, self._body(), part=part, manager=manager, dry=dry, strict=strict
            )
            code = 201 if new else 200
        elif verb == "delete":
            obj, gone = api.delete(resource, namespace, name, self._options(), dry=dry)
            if gone:
                details = {"name": name, "kind": resource.plural, "uid": obj["metadata"]["uid"]}
                if resource.group:
                    details["group"] = resource.group
                status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
                self._send(200, obj if resource.kind == "Pod" else status)
                return
        elif verb == "deletecollection":
            selected = self._selected(resource)
            chosen = [obj for obj in api.store.all(resource, namespace) if selected(obj)]
            gone_all = api.delete_all(resource, chosen, self._options())
            meta = {"resourceVersion": str(api.store.version)}
            self._send(
                200,
                {"kind": resource.list_kind, "apiVersion": resource.api_version, "metadata": meta, "items": gone_all},
            )
            return
        else:
            raise ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        if part == "scale":
            obj = scale_of(obj)
        elif self._wants_table():
            meta = {"resourceVersion": obj["metadata"]["resourceVersion"]}
            obj = tables.table(resource, [obj], meta, self.query.get("includeObject", "Metadata"))
        self._send(code, obj)

    def _body(self) -> Any:
        kind = self.headers.get("Content-Type") or _JSON
        try:
            if self.raw.startswith(protobuf.MAGIC):
                return protobuf.decode(self.raw)
            return yaml.safe_load(self.raw) if "yaml" in kind else msgspec.json.decode(self.raw)
        except (msgspec.DecodeError, ValueError, yaml.YAMLError) as error:
            raise errors.bad_request(f"the object provided is unrecognized: {error}") from None

    def _options(self) -> Json:
        options = self._body() if self.raw else {}
        for field in ("gracePeriodSeconds", "propagationPolicy"):
            if field in self.query:
                value = self.query[field]
                options[field] = int(value) if field == "gracePeriodSeconds" else value
        return options if isinstance(options, dict) else {}

    def _hang(self) -> None:
        while self._alive():
            time.sleep(0.05)
        self.close_connection = True

    def _alive(self) -> bool:
        """Return whether the client may still be listening, and the server running."""
        if not self.owner.serves(self.server):
            return False
        if isinstance(self.connection, ssl.SSLSocket):
            return True
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return not readable or bool(self.connection.recv(1, socket.MSG_PEEK))
        except (OSError, ValueError):
            return False

    def _watch(self, resource: Resource, namespace: str, name: str, fault: Fault | None) -> None:
        owner = self.owner
        watching.checked(self.query, streaming=owner.streaming)
        selected = self._selected(resource, name)
        start = watching.begin(owner.store, self.query)
        self.send_response(200)
        self.send_header("Cache-Control", "no-cache, private")
        self.send_header("Content-Type", _JSON)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        stream = watching.events(
            owner.store, resource, namespace, selected, self.query, start, owner.bookmark_every, self._alive
        )
        as_table = self._wants_table()
        sound = (self._lines(resource, batch, as_table) for batch in stream)
        lines: Iterator[list[bytes] | _End] = _troubled(sound, fault) if fault is not None else sound
        for batch in lines:
            if isinstance(batch, _End):
                self._end_watch(batch, fault)
                return
            if batch:
                self._chunks(batch, fault)
        with contextlib.suppress(OSError):
            if self._alive():
                self.wfile.write(b"0\r\n\r\n")
                return
        self.close_connection = True

    def _lines(self, resource: Resource, batch: list[tuple[str, Stored | Json]], as_table: bool) -> list[bytes]:
        lines = []
        for kind, value in batch:
            if isinstance(value, Stored):
                if as_table:
                    meta = {"resourceVersion": value.obj["metadata"]["resourceVersion"]}
                    include = self.query.get("includeObject", "Metadata")
                    body = msgspec.json.encode(tables.table(resource, [value.obj], meta, include))
                else:
                    body = watching.whole(resource, value)
            else:
                body = msgspec.json.encode(value)
            lines.append(b'{"type":"' + kind.encode() + b'","object":' + body + b"}\n")
        return lines

    def _chunks(self, lines: list[bytes], fault: Fault | None) -> None:
        framed = b"".join(b"%x\r\n%b\r\n" % (len(line), line) for line in lines)
        if fault is None or not (fault.drip or fault.pause):
            self.wfile.write(framed)
            self.wfile.flush()
            return
        step = fault.drip or len(framed)
        for at in range(0, len(framed), step):
            self.wfile.write(framed[at : at + step])
            self.wfile.flush()
            time.sleep(fault.pause)

    def _end_watch(self, end: _End, fault: Fault | None) -> None:
        self._chunks(end.last, fault)
        if end.rest:
            self.wfile.write(b"%x\r\n%b" % (len(end.rest), end.rest[: len(end.rest) // 2]))
            self.wfile.flush()
        if end.stall:
            self._hang()
        elif not end.rest:
            self.wfile.write(b"0\r\n\r\n")
            return
        self.close_connection = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)

    def _send(self, code: int, body: Json, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(code, msgspec.json.encode(body) + b"\n", headers or {})

    def _send_bytes(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Cache-Control": "no-cache, private", "Content-Type": _JSON, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@dataclass(frozen=True)
class _End:
    """How a watch ends before its time: lines still sent, a line that is cut in half, silence after."""

    last: list[bytes]
    rest: bytes = b""
    stall: bool = False


def _troubled(lines: Iterator[list[bytes]], fault: Fault) -> Iterator[list[bytes] | _End]:
    """Yield the lines of a watch with what the fault does to them."""
    sent = 0
    held: list[bytes] = []
    for batch in lines:
        if fault.quiet:
            batch = [line for line in batch if b'"BOOKMARK"' not in line[:24]]
        if fault.duplicate:
            batch = [copy for line in batch for copy in (line, line)]
        if fault.swap:
            held += batch
            pairs = len(held) // 2 * 2
            batch = [line for at in range(0, pairs, 2) for line in (held[at + 1], held[at])]
            held = held[pairs:]
        if fault.ends_watch and sent + len(batch) >= fault.after:
            room = fault.after - sent
            yield _ending(batch[:room], batch[room:], fault)
            return
        sent += len(batch)
        yield batch


def _ending(sent: list[bytes], left: list[bytes], fault: Fault) -> _End:
    if fault.gone:
        gone = errors.expired("too old resource version: 1 (2)").status()
        return _End([*sent, b'{"type":"ERROR","object":' + msgspec.json.encode(gone) + b"}\n"])
    if fault.garbage:
        return _End([*sent, b'{"type":"ADDED","object":{"metadata"}\n'])
    if fault.cut:
        return _End(sent, left[0] if left else b'{"type":"MODIFIED","object":{"kind"' * 2)
    return _End(sent, stall=fault.stall)
