"""The agent's side of the executable's socket: root only, and only callers of our own namespace.

Each thread accepts calls and serves them; whoever was the last idle one starts another, so that no call waits.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cni import verbs
from cni.client import NOT_MINE, TAKEN
from cni.context import AgentContext
from cni.ipam.ranges import TYPE
from pynet.kernel import netns

SOCKET = "pynetd.sock"
OnRequest = Callable[[str, int, float], None]
"""Told after each call: its verb, the exit code (0 is success), and the seconds it took."""

_LIMIT = 16 << 20
_IDLE_SECONDS = 60
_IDLE_THREADS = 4


class Server:
    """Listens on `<state_dir>/pynetd.sock` from `start` to `close`."""

    def __init__(self, state_dir: Path | str, on_request: OnRequest | None = None) -> None:
        self.path = f"{state_dir}/{SOCKET}"
        self._on_request = on_request
        self._context = AgentContext()
        self._listener: socket.socket | None = None
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._lock = threading.Lock()
        self._home, self._own = -1, (0, 0)

    def start(self) -> None:
        """Begin to serve. Raise `OSError` when another agent listens there."""
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        _refuse_second(self.path)
        self._home = netns.own()
        self._own = netns.identity(self._home)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        draft = f"{self.path}.{os.getpid()}"
        with suppress(FileNotFoundError):
            os.unlink(draft)
        listener.bind(draft)
        os.chmod(draft, 0o600)
        listener.listen(1024)
        os.replace(draft, self.path)
        self._listener = listener
        self._one_more()

    def close(self) -> None:
        """Stop to accept, finish the calls under way, remove the socket."""
        if self._listener is None:
            return
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        deadline = time.monotonic() + _IDLE_SECONDS
        while (waiting := self._waiting()) and time.monotonic() < deadline:
            waiting[0].join(timeout=1)
        self._listener = None
        os.close(self._home)
        self._context.close()

    def _waiting(self) -> list[threading.Thread]:
        with self._lock:
            return [thread for thread in self._threads if thread.is_alive()]

    def _one_more(self) -> None:
        thread = threading.Thread(target=self._accept, args=(self._listener,), name="cni-call", daemon=True)
        with self._lock:
            self._threads.add(thread)
            self._idle += 1
        try:
            thread.start()
        except RuntimeError as error:  # no thread left: calls wait for those under way
            print(f"pynetd: calls of pynet-cni wait: {error}", file=sys.stderr)
            with self._lock:
                self._threads.discard(thread)
                self._idle -= 1

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if listener.fileno() >= 0 and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    time.sleep(0.1)
                    continue
                break  # the listener is closed
            with self._lock:
                self._idle -= 1
                last = self._idle == 0
            if last:
                self._one_more()
            self._serve(connection)
            if netns.path_identity("/proc/thread-self/ns/net") != self._own:
                netns.enter(self._home)  # a call that broke off in a pod must not hand its place to the next one
            with self._lock:
                if self._idle >= _IDLE_THREADS:
                    break
                self._idle += 1
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _serve(self, connection: socket.socket) -> None:
        begun = time.monotonic()
        fds: list[int] = []
        try:
            with connection:
                connection.settimeout(_IDLE_SECONDS)
                seen = _caller(connection)
                program, environment, stdin = _request(_receive(connection, fds))
                if not self._is_ours(seen, environment.pop("CALLER", ""), stdin):
                    connection.sendall(NOT_MINE)
                    return
                connection.sendall(TAKEN)  # fails when the caller has given up and serves itself
                answer = verbs.serve(
                    environment, stdin, self._context,
                    only_ipam=program == "ipam", pod_netns=fds[0] if fds else -1,
                )  # fmt: skip
                if self._on_request is not None:  # before the answer: who has it finds it counted
                    self._on_request(environment.get("CNI_COMMAND", ""), answer.code, time.monotonic() - begun)
                connection.sendall(b"%d" % answer.code + answer.output.encode())
        except (OSError, ValueError) as error:
            print(f"pynetd: a call of pynet-cni broke off: {error}", file=sys.stderr)
        finally:
            for fd in fds:
                os.close(fd)

    def _is_ours(self, seen: tuple[int, netns.Identity | None], told: str, stdin: bytes) -> bool:
        """Say whether the caller is root and in our network namespace: another's pods would be wired to our bridge.

        What it tells of itself holds where its process cannot be seen, as from a container; whoever is root may lie.
        Then its files are not ours either, and a call that needs them is left to it.
        """
        uid, space = seen
        if uid != 0:
            return False
        if space is not None:
            return space == self._own
        space_told, _, mounts = told.partition(":")
        if space_told != str(self._own[1]):
            return False
        return mounts == str(os.stat("/proc/self/ns/mnt").st_ino) or not needs_files(stdin)


def needs_files(stdin: bytes) -> bool:
    """Say whether a configuration names files or programs of the host: another IPAM plugin, or a path of ours."""
    import json

    try:
        ipam = (json.loads(stdin) or {}).get("ipam") or {}
        return bool(ipam.get("type", TYPE) != TYPE or ipam.get("dataDir") or ipam.get("resolvConf"))
    except (ValueError, AttributeError, RecursionError):
        return False  # it is refused, by whoever serves it


def _caller(connection: socket.socket) -> tuple[int, netns.Identity | None]:
    """Return the user and the network namespace of the process at the other end; None where it cannot be seen."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return uid, netns.path_identity(f"/proc/{pid}/ns/net") if pid > 0 else None


def _refuse_second(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise OSError(98, f"{path}: another agent serves this socket")


def _receive(connection: socket.socket, fds: list[int]) -> bytes:
    """Return the whole message; descriptors that came with it are added to `fds`."""
    chunks: list[bytes] = []
    size = 0
    while True:
        data, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds += struct.unpack(f"{len(payload) // 4}i", payload[: len(payload) // 4 * 4])
        if not data:
            return b"".join(chunks)
        chunks.append(data)
        size += len(data)
        if size > _LIMIT:
            raise ValueError(f"a request of more than {_LIMIT} bytes")


def _request(message: bytes) -> tuple[str, dict[str, str], bytes]:
    """Return program, environment and stdin: fields with zero bytes between, an empty one before stdin."""
    head, _, stdin = message.partition(b"\0\0")
    program, *fields = head.split(b"\0")
    environment = {}
    for field in fields:
        key, _, value = field.partition(b"=")
        environment[os.fsdecode(key)] = os.fsdecode(value)
    return os.fsdecode(program), environment, stdin
