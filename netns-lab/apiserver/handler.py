"""One HTTP connection: what a request asks of `api` and `watching`, and how the answer goes out.

With authentication, the faults that the server's script has for it, and a record of what was asked.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
import yaml

from apiserver import authorization, discovery, errors, protobuf, schemas, selectors, tables, watching
from apiserver.api import scale_of
from apiserver.errors import ApiError
from apiserver.faults import End, Fault, troubled
from apiserver.resources import BY_PATH, Resource
from apiserver.store import Stored

if TYPE_CHECKING:
    from apiserver.server import Listener

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
    user: str = ""


class Handler(BaseHTTPRequestHandler):
    """Serves one connection; a thread of its own."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    server: Listener

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: `requests` is the record."""

    def do_GET(self) -> None:
        """Serve a request, whatever its method."""
        self._handle()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET  # noqa: N815 (the names that http.server calls)

    def _handle(self) -> None:
        self.owner = self.server.owner
        split = urlsplit(self.path)
        self.query = dict(parse_qsl(split.query, keep_blank_values=True))
        length = int(self.headers.get("Content-Length") or 0)
        self.raw = self.rfile.read(length) if length else b""
        try:
            self.packer: Any = None
            self.user = self._authenticate()
            self._route(split.path)
        except ApiError as error:
            self._send(error.code, error.status(), error.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        self.wfile.flush()

    def _authenticate(self) -> str:
        """Return who asks, by name where the server's tokens say one."""
        tokens = self.owner.tokens
        if tokens is None:
            return ""
        if isinstance(self.connection, ssl.SSLSocket) and self.connection.getpeercert():
            return ""
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or token not in tokens:
            raise errors.unauthorized()
        return tokens[token] if isinstance(tokens, Mapping) else ""

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
            verb,
            resource.group,
            resource.plural,
            namespace,
            name,
            part,
            self.path,
            self.query,
            dict(self.headers),
            self.user,
        )
        self.owner.requests.append(asked)
        authorization.forbid(self.owner.store, self.user, verb, resource.group, resource.plural, namespace, part)
        fault = self.owner.faults.next(resource.plural, verb)
        if fault is not None:
            self.packer = zlib.compressobj(wbits=31) if fault.gzip else None
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
        self.close_connection = self.close_connection or bool(fault and fault.hangup)

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
            served = [resource for resource in BY_PATH.values() if resource.base == base]
            body = discovery.openapi(base, schemas=schemas.schemas(served))
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
                resource,
                namespace,
                name,
                kind,
                self._body(),
                part=part,
                manager=manager,
                force=self.query.get("force") == "true",
                dry=dry,
                strict=strict,
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
        if self.packer:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.flush()
        stream = watching.events(
            owner.store, resource, namespace, selected, self.query, start, owner.bookmark_every, self._alive
        )
        as_table = self._wants_table()
        sound = (self._lines(resource, batch, as_table) for batch in stream)
        lines: Iterator[list[bytes] | End] = troubled(sound, fault) if fault is not None else sound
        for batch in lines:
            if isinstance(batch, End):
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
        if self.packer:
            lines = [self.packer.compress(b"".join(lines)) + self.packer.flush(zlib.Z_SYNC_FLUSH)]
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

    def _end_watch(self, end: End, fault: Fault | None) -> None:
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
        if self.packer:
            body, headers = self.packer.compress(body) + self.packer.flush(), {**headers, "Content-Encoding": "gzip"}
        self.send_response(code)
        for name, value in {"Cache-Control": "no-cache, private", "Content-Type": _JSON, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
