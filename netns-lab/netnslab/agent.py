"""What runs in every pod, node and client of a lab: an echo server that says who it is and whom it saw, and a prober.

Started as `python -IS agent.py NAME CONTROL [PROTO:PORT …]`: standard library only, few imports, one process each.
Serving: a line (TCP) or a datagram (UDP) is answered with a line of JSON {"pod", "source", "port"}; an HTTP request
with the same as a body. Probing: each connection to the unix socket CONTROL is one JSON request and its JSON answer
(`OPERATIONS`). Knows nothing of the lab.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Message = dict[str, Any]
    Peer = Any

ANY = ("::", "0.0.0.0")
STRAGGLERS = 1.0  # seconds: a datagram later than that counts as lost
OUTCOMES = {
    errno.ECONNREFUSED: "refused",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.ECONNRESET: "reset",
    errno.EPERM: "forbidden",
    errno.EACCES: "forbidden",
}


def plain(address: str) -> str:
    """Return an address as a pod's user writes it: an IPv4 client of a dual-stack socket without its ::ffff: prefix."""
    return address.removeprefix("::ffff:")


class Server:
    """The echo server: every port of the pod in one selector loop."""

    def __init__(self, name: str, ports: list[tuple[str, int]]) -> None:
        self.name = name
        self.selector = selectors.DefaultSelector()
        for proto, port in ports:
            self.listen(proto, port)

    def listen(self, proto: str, port: int) -> None:
        """Serve one port on all addresses of both families (IPv4 alone where the kernel has no IPv6)."""
        kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
        try:
            server = socket.socket(socket.AF_INET6, kind)
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            any_address = ANY[0]
        except OSError:
            server = socket.socket(socket.AF_INET, kind)
            any_address = ANY[1]
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((any_address, port))
        server.setblocking(False)
        if proto == "tcp":
            server.listen(1024)
            self.selector.register(server, selectors.EVENT_READ, (self.accept, port, None))
        else:
            self.selector.register(server, selectors.EVENT_READ, (self.datagram, port, None))

    def answer(self, peer: Peer, port: int) -> bytes:
        """Return the line that tells a client what the pod saw."""
        host = plain(peer[0])
        host = f"[{host}]" if ":" in host else host
        return json.dumps({"pod": self.name, "source": f"{host}:{peer[1]}", "port": port}).encode() + b"\n"

    def accept(self, server: socket.socket, port: int, _: Peer) -> None:
        """Take all waiting connections."""
        while True:
            try:
                connection, peer = server.accept()
            except OSError:
                return
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ, (self.line, port, peer))

    def datagram(self, server: socket.socket, port: int, _: Peer) -> None:
        """Answer waiting datagrams, with what follows `seq ` in them sent back."""
        for _ in range(64):
            try:
                data, peer = server.recvfrom(65535)
            except OSError:
                return
            with contextlib.suppress(OSError):
                server.sendto(data if data.startswith(b"seq ") else self.answer(peer, port), peer)

    def line(self, connection: socket.socket, port: int, peer: Peer) -> None:
        """Answer each line that has come in; a connection that its client ended is closed."""
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(connection)
            connection.close()
            return
        answer = self.answer(peer, port)
        try:
            if data[:4] in (b"GET ", b"HEAD"):
                head = f"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n"
                connection.sendall(head.encode() + (b"" if data.startswith(b"HEAD") else answer))
                self.selector.unregister(connection)
                connection.close()
            elif data.startswith(b"seq "):
                connection.sendall(data)
            else:
                connection.sendall(answer * data.count(b"\n"))
        except OSError:
            self.selector.unregister(connection)
            connection.close()

    def run(self) -> None:
        """Serve until the process is ended."""
        while True:
            for key, _ in self.selector.select():
                handle, port, peer = key.data
                handle(key.fileobj, port, peer)


def open_to(proto: str, address: str, port: int, timeout: float, source_port: int = 0) -> socket.socket:
    """Return a connected socket."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM)
    try:
        client.settimeout(timeout)
        if source_port:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("", source_port))
        client.connect((address, port))
    except OSError:
        client.close()
        raise
    return client


def ask_once(proto: str, address: str, port: int, timeout: float, source_port: int = 0) -> list[object]:
    """Make one connection (or send one datagram); return [outcome, pod, source, milliseconds]."""
    begin = time.monotonic()
    pod = source = ""
    try:
        with open_to(proto, address, port, timeout, source_port) as client:
            client.send(b"who\n")
            data = client.recv(4096)
        if data:
            reply = json.loads(data)
            outcome, pod, source = "ok", reply["pod"], reply["source"]
        else:
            outcome = "closed"
    except TimeoutError:
        outcome = "timeout"
    except OSError as error:
        outcome = OUTCOMES.get(error.errno or 0, errno.errorcode.get(error.errno or 0, str(error)))
    except ValueError:
        outcome = "garbage"
    return [outcome, pod, source, round((time.monotonic() - begin) * 1000, 1)]


def ask(request: Message) -> Message:
    """Ask a port `count` times, one after the other; stop early when three of them got no answer."""
    results = []
    for _ in range(request.get("count", 1)):
        results.append(
            ask_once(
                request["proto"],
                request["address"],
                request["port"],
                request.get("timeout", 2.0),
                request.get("source_port", 0),
            )
        )
        if sum(result[0] == "timeout" for result in results) == 3:
            break
    return {"results": results}


def http(request: Message) -> Message:
    """GET a path; return the status (0: no answer) and the body."""
    try:
        with open_to("tcp", request["address"], request["port"], request.get("timeout", 2.0)) as client:
            host = f"[{request['address']}]" if ":" in request["address"] else request["address"]
            client.sendall(f"GET {request['path']} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            data = b""
            while chunk := client.recv(65536):
                data += chunk
    except OSError as error:
        return {"status": 0, "body": str(error)}
    head, _, body = data.partition(b"\r\n\r\n" if b"\r\n\r\n" in data else b"\n\n")  # a CGI program may write \n only
    try:
        status = int(head.split(None, 2)[1])
    except (IndexError, ValueError):
        return {"status": 0, "body": head.decode(errors="replace")}
    return {"status": status, "body": body.decode(errors="replace")}


class Flow(threading.Thread):
    """A connection kept in use: a numbered message every `interval` seconds; counts what got lost on the way.

    On a connection each message waits for the answer to the one before; datagrams wait for none.
    """

    def __init__(self, request: Message) -> None:
        super().__init__(daemon=True)
        self.client = open_to(request["proto"], request["address"], request["port"], request.get("timeout", 2.0))
        self.interval = request.get("interval", 0.02)
        self.reliable = request["proto"] == "tcp"
        self.done = threading.Event()
        self.sent = self.lost = 0
        self.longest = 0.0
        self.answered = time.monotonic()
        self.error = ""

    def run(self) -> None:
        """Exchange messages until ended."""
        if self.reliable:
            self._exchange()
        else:
            self._send_on()

    def _exchange(self) -> None:
        self.client.settimeout(10.0)
        while not self.done.wait(self.interval):
            self.sent += 1
            message = b"seq %d\n" % self.sent
            try:
                self.client.send(message)
                while (got := self.client.recv(4096)) != message:
                    if not got:
                        self.error = "closed"
                        return
            except TimeoutError:
                self.lost += 1
                continue
            except OSError as error:
                self.error = str(error)
                return
            self._answer()

    def _send_on(self) -> None:
        open_ones: set[bytes] = set()
        while not self.done.is_set():
            self.sent += 1
            message = b"seq %d\n" % self.sent
            open_ones.add(message)
            with contextlib.suppress(OSError):  # a datagram refused is a datagram lost; the client goes on
                self.client.send(message)
            self._receive(open_ones, self.interval)
        self._receive(open_ones, STRAGGLERS)
        self.lost = len(open_ones)

    def _receive(self, open_ones: set[bytes], seconds: float) -> None:
        """Take answers for so long; once the flow is to end, no longer than something is still open."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and (open_ones or not self.done.is_set()):
            self.client.settimeout(left)
            try:
                answer = self.client.recv(4096)
            except OSError:  # none came in time, or one was refused
                continue
            if answer in open_ones:
                open_ones.remove(answer)
                self._answer()

    def _answer(self) -> None:
        now = time.monotonic()
        self.longest = max(self.longest, now - self.answered)
        self.answered = now


flows: dict[str, Flow] = {}


def flow_begin(request: Message) -> Message:
    """Open a flow under a name."""
    try:
        flow = flows[request["name"]] = Flow(request)
    except OSError as error:
        return {"error": str(error) or "timeout"}
    flow.start()
    return {}


def flow_end(request: Message) -> Message:
    """End a flow; return what became of it."""
    flow = flows.pop(request["name"], None)
    if flow is None:
        return {"error": f"no flow {request['name']}"}
    silence = round(time.monotonic() - flow.answered, 3)
    flow.done.set()
    flow.join(12)
    flow.client.close()
    return {
        "sent": flow.sent, "lost": flow.lost, "longest": round(flow.longest, 3), "broken": flow.error,
        "silence": silence,
    }  # fmt: skip


def flow_look(request: Message) -> Message:
    """Return how long ago a flow's last answer came, seconds."""
    return {"silence": round(time.monotonic() - flows[request["name"]].answered, 3)}


def ping(_request: Message) -> Message:
    """Say that the process lives."""
    return {"pid": os.getpid()}


OPERATIONS = {
    "ping": ping,
    "ask": ask,
    "http": http,
    "flow_begin": flow_begin,
    "flow_look": flow_look,
    "flow_end": flow_end,
}


def serve_control(connection: socket.socket) -> None:
    """Answer one request of the lab."""
    with connection:
        data = b""
        while not data.endswith(b"\n"):
            chunk = connection.recv(65536)
            if not chunk:
                return
            data += chunk
        request = json.loads(data)
        try:
            reply = OPERATIONS[request["operation"]](request)
        except Exception as error:  # the lab is told; the server goes on serving
            reply = {"error": f"{type(error).__name__}: {error}"}
        connection.sendall(json.dumps(reply).encode() + b"\n")


def main(arguments: list[str]) -> None:
    """Serve the ports given, and the control socket."""
    name, control_path, *ports = arguments
    server = Server(name, [(proto, int(port)) for proto, port in (each.split(":") for each in ports)])
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.bind(control_path + ".new")
    control.listen(128)
    os.rename(control_path + ".new", control_path)
    threading.Thread(target=server.run, daemon=True).start()
    while True:
        connection, _ = control.accept()
        threading.Thread(target=serve_control, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
