"""The daemons' HTTP server on loopback, and the forms of an address to serve on."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from pynet.daemon.http import BindError, Reply, Server, address_of, metrics_reply, serve


def get(server: Server, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.address[1]}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def broken() -> Reply:
    raise RuntimeError("no answer")


@pytest.mark.parametrize("bind", ["127.0.0.1:0", ":0", "[::]:0"])
def test_it_answers_by_path(bind: str) -> None:
    registry = CollectorRegistry()
    Counter("seen", "What was seen.", registry=registry).inc()
    server = serve(
        bind,
        {"/healthz": lambda: Reply(503, body=b"no"), "/metrics": lambda: metrics_reply(registry), "/broken": broken},
    )
    assert server is not None
    try:
        assert get(server, "/healthz?full=1") == (503, "no")
        assert "seen_total 1.0" in get(server, "/metrics")[1]
        assert get(server, "/other")[0] == 404
        assert get(server, "/broken")[0] == 500
    finally:
        server.close()


def test_nothing_is_served_on_no_address() -> None:
    assert serve("", {}) is None


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        ("127.0.0.1:10256", ("127.0.0.1", 10256)),
        ("[::1]:10256", ("::1", 10256)),
        (":10256", ("", 10256)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
    ],
)
def test_addresses(bind: str, expected: tuple[str, int]) -> None:
    assert address_of(bind) == expected


@pytest.mark.parametrize("bind", ["127.0.0.1", "10256", "127.0.0.1:http", "127.0.0.1:70000"])
def test_what_is_no_address(bind: str) -> None:
    with pytest.raises(BindError, match="expected HOST:PORT"):
        address_of(bind)


def test_a_port_in_use_is_named() -> None:
    server = Server("127.0.0.1:0", {})
    try:
        with pytest.raises(BindError, match=rf"127\.0\.0\.1:{server.address[1]}"):
            Server(f"127.0.0.1:{server.address[1]}", {})
    finally:
        server.close()


def test_a_successor_serves_on_the_port_at_once() -> None:
    first = serve("127.0.0.1:0", {"/": lambda: Reply(200, body=b"one")})
    assert first is not None
    port = first.address[1]
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while client.recv(4096):
            pass  # the server closes first: its end stays in TIME_WAIT
    first.close()
    second = serve(f"127.0.0.1:{port}", {"/": lambda: Reply(200, body=b"two")})
    assert second is not None
    second.close()
