"""Requests to an API server: bytes out, bytes in, over the official client's pools (TLS, proxies, certificates).

Knows HTTP and how a connection dies; knows no Kubernetes object but the Status of an error.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

import msgspec
import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning, ReadTimeoutError

from pynet.sources.credentials import Credentials, Login
from pynet.sources.kubeconfig import BadCredentials

CONNECT = 10.0  # seconds to make a connection
ANSWER = 60.0  # seconds of silence within an answer that is not a watch
_CHUNK = 1 << 18
# A peer that vanished without a word: probed after 15 s of silence, given up after 30 (as client-go's HTTP/2 pings).
_KEEPALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
]


class Unreachable(Exception):
    """No answer, or half of one: the network, TLS, a time-out, credentials that cannot be read."""


class Silent(Unreachable):
    """Nothing came for as long as silence was allowed."""


class Cause(msgspec.Struct, frozen=True):
    """One cause within a Status."""

    reason: str = ""
    message: str = ""


class Details(msgspec.Struct, frozen=True, rename="camel"):
    """Status.details."""

    causes: tuple[Cause, ...] | None = None
    retry_after_seconds: int = 0


class Status(msgspec.Struct, frozen=True):
    """meta/v1 Status: how the API says no."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: Details | None = None

    @property
    def causes(self) -> frozenset[str]:
        """The reasons of its causes."""
        return frozenset(cause.reason for cause in (self.details.causes or ())) if self.details else frozenset()


class Refused(Exception):
    """The server answered with an error. `retry_after`: seconds that it asks to wait."""

    def __init__(self, status: Status, retry_after: float) -> None:
        super().__init__(f"{status.code} {status.reason}: {status.message}")
        self.status = status
        self.retry_after = retry_after


class Stream:
    """The body of an answer as it comes; `close` may be called from another thread, and ends the reading."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        """Yield bytes until the server ends the answer well; raise `Unreachable` when it ends otherwise."""
        try:
            while chunk := self._response.read1(_CHUNK):
                yield chunk
        except (ReadTimeoutError, TimeoutError):
            raise Silent("silence for longer than allowed") from None
        except (HTTPError, OSError, ValueError, AttributeError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from None
        finally:
            self._response.close()

    def allow_silence(self, seconds: float) -> None:
        """Let `seconds` of silence pass from now on before the reading ends; from the reading thread only."""
        socket_of = getattr(self._response.connection, "sock", None)
        if socket_of is not None:
            socket_of.settimeout(seconds)

    def close(self) -> None:
        """End the reading, wherever it is."""
        with contextlib.suppress(Exception):
            self._response.shutdown()


class Limit:
    """So many requests a second, so many at once (qps and burst, as kube-proxy's client has them)."""

    def __init__(self, qps: float, burst: int) -> None:
        self._qps = qps
        self._burst = float(max(burst, 1))
        self._tokens = self._burst
        self._at = time.monotonic()
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when the next request may go out; qps 0 or less is no limit."""
        if self._qps <= 0:
            return
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._qps) - 1
            self._at = now
            owed = -self._tokens
        if owed > 0:
            time.sleep(owed / self._qps)


class Transport:
    """One API server. Safe to use from many threads."""

    def __init__(self, credentials: Credentials, *, qps: float = 5, burst: int = 10) -> None:
        self._credentials = credentials
        self._limit = Limit(qps, burst)
        self._lock = threading.Lock()
        self._pools: tuple[int, Any] | None = None
        self._streams: set[Stream] = set()
        self._closed = False

    def get(self, path: str, query: Mapping[str, str]) -> bytes:
        """Return the body of a GET. Raise `Refused` or `Unreachable`."""
        return b"".join(self._open("GET", path, query, ANSWER))

    def send(self, method: str, path: str, body: bytes, content_type: str) -> bytes:
        """Send `body` and return the answer's. Raise `Refused` or `Unreachable`."""
        return b"".join(self._open(method, path, {}, ANSWER, body, content_type))

    @contextlib.contextmanager
    def watch(self, path: str, query: Mapping[str, str], idle: float) -> Iterator[Stream]:
        """Give the body of a GET as it comes; silence of `idle` seconds ends it. Raise `Refused` or `Unreachable`."""
        stream = self._open("GET", path, query, idle)
        with self._lock:
            self._streams.add(stream)
            closed = self._closed
        try:
            if closed:
                stream.close()
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)
            stream.close()

    def close(self) -> None:
        """End every watch, of whichever thread."""
        with self._lock:
            self._closed = True
            streams = tuple(self._streams)
        for stream in streams:
            stream.close()

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        silence: float,
        body: bytes | None = None,
        content_type: str = "",
    ) -> Stream:
        self._limit.wait()
        try:
            login = self._credentials.login()
        except BadCredentials as error:
            raise Unreachable(str(error)) from None
        headers = {"Accept": "application/json", "User-Agent": "pynet", "Accept-Encoding": "identity"}
        for setting in login.configuration.auth_settings().values():
            headers[setting["key"]] = setting["value"]
        if content_type:
            headers["Content-Type"] = content_type
        url = login.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        try:
            response = self._pool(login).request(
                method,
                url,
                headers=headers,
                body=body,
                preload_content=False,
                retries=False,
                redirect=False,
                timeout=urllib3.Timeout(connect=CONNECT, read=silence),
            )
        except ReadTimeoutError:
            raise Silent(f"{login.configuration.host}: no answer within {silence:.0f} s") from None
        except (HTTPError, OSError, ValueError) as error:
            raise Unreachable(f"{login.configuration.host}: {error}") from None
        if response.status >= 300:
            raise self._refused(response, login)
        return Stream(response)

    def _refused(self, response: Any, login: Login) -> Refused | Unreachable:
        if response.status == 401:
            self._credentials.refused(login)
        try:
            body = response.read(1 << 20)
        except (HTTPError, OSError) as error:
            return Unreachable(str(error))
        finally:
            response.close()
        try:
            status = msgspec.json.decode(body, type=Status)
        except msgspec.DecodeError:
            status = Status(message=body[:200].decode(errors="replace").strip(), reason=response.reason or "")
        status = msgspec.structs.replace(status, code=response.status)
        asked = response.headers.get("Retry-After", "")
        seconds = (
            float(asked) if asked.isdigit() else float(status.details.retry_after_seconds if status.details else 0)
        )
        return Refused(status, seconds)

    def _pool(self, login: Login) -> Any:
        """Return the pools of connections that were made with these credentials, new ones where they changed."""
        from kubernetes.client.rest import RESTClientObject

        with self._lock:
            if self._pools is None or self._pools[0] != login.number:
                login.configuration.socket_options = _KEEPALIVE
                if not login.configuration.verify_ssl:  # by the operator's choice
                    urllib3.disable_warnings(InsecureRequestWarning)
                self._pools = (login.number, RESTClientObject(login.configuration).pool_manager)
            return self._pools[1]
