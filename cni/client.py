"""The executable: hands the call to the agent's socket with the pod's namespace; without an agent, serves in process.

Its imports are built into the interpreter; `cni.install` writes it out with the interpreter's path and ROOT filled in.
"""

import _socket
import posix
import sys

ROOT = ""
ONLY_IPAM = False
STATE_DIR = b"/run/pynet"
TAKEN, NOT_MINE = b".", b"-"
"""The agent's first byte: it serves the call, or leaves it to us."""
TAKING_SECONDS = 10
"""An agent that has not taken a call by then hangs; it does not serve one whose caller has gone."""
ANSWER_SECONDS = 150
"""Longer than the longest that the agent waits for anything, an IPAM plugin (delegate.py)."""
SERVE_IN_PROCESS, HANGS = object(), object()


def main() -> int:
    """Serve one call and return the exit code."""
    environment = posix.environ
    command = environment.get(b"CNI_COMMAND")
    if not command or command == b"VERSION":
        return in_process(None)
    try:
        stdin = read_all(0)
    except OSError:
        return in_process(None)  # which says what is wrong with it
    answer = from_agent(environment, stdin, state_dir(stdin))
    return in_process(stdin, again=answer is None and command == b"ADD", hangs=answer is HANGS)


def state_dir(stdin: bytes) -> bytes:
    """Return the configuration's stateDir without decoding it: a folder that is wrong only costs the agent's speed."""
    at = stdin.rfind(b'"stateDir"')
    if at < 0:
        return STATE_DIR
    colon, _, rest = stdin[at + 10 :].lstrip().partition(b'"')
    value, quote, _ = rest.partition(b'"')
    if colon.strip() != b":" or not quote or b"\\" in value or not value:
        return STATE_DIR
    return value


def from_agent(environment: "dict[bytes, bytes]", stdin: bytes, folder: bytes) -> object:
    """Pass on the agent's answer and end; SERVE_IN_PROCESS without an agent, None when it died over the call."""
    agent = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        agent.connect(folder.rstrip(b"/") + b"/pynetd.sock")
    except OSError:
        return SERVE_IN_PROCESS
    fields = [b"%s=%s" % item for item in environment.items() if item[0].startswith(b"CNI_") or item[0] == b"PATH"]
    message = b"\0".join([b"ipam" if ONLY_IPAM else b"cni", *fields, *whose(), b"", stdin])
    rights = []
    try:
        netns = environment.get(b"CNI_NETNS")
        if netns:
            fd = posix.open(netns, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
            rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
    except OSError:
        pass  # the agent names what is wrong with it
    agent.settimeout(TAKING_SECONDS)
    try:
        sent = agent.sendmsg([message], rights)
        agent.sendall(message[sent:])
        agent.shutdown(_socket.SHUT_WR)
        first = agent.recv(1)
    except OSError:
        first = b""
    if first != TAKEN:
        agent.close()
        return SERVE_IN_PROCESS
    agent.settimeout(ANSWER_SECONDS)
    reply = b""
    try:
        while chunk := agent.recv(1 << 16):
            reply += chunk
    except TimeoutError:
        return HANGS
    except OSError:
        return None
    if not reply:
        return None
    write_all(1, reply[1:])
    posix._exit(reply[0] - 48)  # taking the interpreter down in order costs more than all that was done here


def whose() -> "list[bytes]":
    """Return our network and mount namespaces as a field: an agent in a container cannot see our process."""
    try:
        return [b"CALLER=%d:%d" % (posix.stat("/proc/self/ns/net").st_ino, posix.stat("/proc/self/ns/mnt").st_ino)]
    except OSError:
        return []


def in_process(stdin: "bytes | None", again: bool = False, hangs: bool = False) -> int:
    """Serve the call here, with the same code as the agent."""
    if ROOT and ROOT not in sys.path:
        sys.path.insert(0, ROOT)
    from cni import plugin

    if hangs:
        return plugin.refuse(f"the agent has taken the call and not answered for {ANSWER_SECONDS} s")
    return plugin.run(only_ipam=ONLY_IPAM, stdin=stdin, again=again)


def read_all(fd: int) -> bytes:
    """Return what can be read until the end."""
    chunks = []
    while chunk := posix.read(fd, 1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[posix.write(fd, data) :]


if __name__ == "__main__":
    sys.exit(main())
