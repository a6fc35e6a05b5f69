"""The program `pynetd`: flags, wiring, and the commands `install` and `status`."""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cni.install import install
from cni.node import status
from cni.node.addresses import usage
from cni.node.agent import Agent, Options
from cni.node.cleanup import clean
from cni.node.conflist import with_room
from cni.node.ledger import Ledger
from cni.node.metrics import Metrics
from cni.node.podcidrs import BadPool, Pool, pools
from cni.node.routes import PROTOCOL, Settings
from cni.serve import Server
from pynet.daemon import http, lifecycle, logs, privileges
from pynet.kernel.netevents import Watch
from pynet.kernel.routes import Rtnetlink
from pynet.netstate import family_of
from pynet.sources import Source
from pynet.sources.events import Events
from pynet.sources.flags import NoSource, add_source_flags, events_from, source_from
from pynet.sources.manifests import Manifests

log = logs.get(__name__)
STATE_DIR = Path("/run/pynet")
_LOCK_PATIENCE = 2.0  # seconds that a predecessor has to end
# to write routes and rules; to tell neighbours; to enter pods' network namespaces
_NEEDED = (privileges.NET_ADMIN, privileges.NET_RAW, privileges.SYS_ADMIN)
_FAILING_LIMIT = 120.0  # seconds of failure after which /healthz says so

_EPILOG = f"""\
commands:
  pynetd install --cni-bin-dir DIR   put the executables pynet-cni and pynet-ipam there, in one step each
  pynetd status [--state-dir DIR]    print the other nodes, how each one's pods are reached, and why
  pynetd --cleanup                   remove what is ours (routes of protocol {PROTOCOL}, VXLAN devices, rules), and end
"""


def main() -> int:
    """Run the program; return its exit status."""
    arguments = sys.argv[1:]
    commands: dict[str, Callable[[list[str]], int]] = {"install": _install, "status": _status}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return _serve(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pynetd",
        description="The node agent: keeps the ways to the pods of every other node, and serves the CNI executable.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_flags(parser)
    node = parser.add_argument_group("this node")
    node.add_argument("--node-name", metavar="NAME", help="name of this machine's Node (default: the host's name)")
    node.add_argument("--state-dir", type=Path, default=STATE_DIR, metavar="DIR", help="socket, lock, node file, IPAM")
    node.add_argument("--cni-conf-dir", type=Path, metavar="DIR", help="write the network configuration there")
    node.add_argument("--bridge", type=_link, default="pynet0", metavar="NAME", help="the pods' bridge (%(default)s)")
    node.add_argument("--mtu", type=_mtu, default=0, metavar="BYTES", help="MTU of pods (0: what fits every way)")
    ways = parser.add_argument_group("ways to the other nodes")
    ways.add_argument(
        "--backend", choices=("auto", "host-gw", "vxlan"), default="auto",
        help="host-gw: direct routes, to nodes of the same subnet only; vxlan: all by VXLAN; "
        "auto (default): direct where that can be, else VXLAN",
    )  # fmt: skip
    ways.add_argument("--vxlan-vni", type=_vni, default=112, metavar="N", help="VXLAN network identifier (%(default)s)")
    ways.add_argument("--vxlan-port", type=_port, default=4789, metavar="PORT", help="UDP port (%(default)s)")
    ways.add_argument("--cluster-cidr", type=_cidrs, default=(), metavar="CIDR,…", help="where all pods' addresses are")
    ways.add_argument("--allocate-node-cidrs", action="store_true", help="assign pod CIDRs (only with --manifests)")
    ways.add_argument("--node-cidr-mask-size", type=int, metavar="BITS", help="length of assigned pod CIDRs (24, 64)")
    ways.add_argument("--node-cidr-mask-size-ipv4", type=int, metavar="BITS", help="the same, of IPv4's")
    ways.add_argument("--node-cidr-mask-size-ipv6", type=int, metavar="BITS", help="the same, of IPv6's")
    ways.add_argument(
        "--resync-period", type=_duration, default=60.0, metavar="TIME", help="full look at least this often (60s)"
    )
    masquerade = parser.add_argument_group("masquerade (of what pods send out of the cluster)")
    masquerade.add_argument("--masquerade", choices=("auto", "nftables", "iptables", "off"), default="auto")
    masquerade.add_argument(
        "--non-masquerade-cidrs", type=_cidrs, default=(), metavar="CIDR,…", help="further destinations to leave alone"
    )
    masquerade.add_argument("--masq-link-local", action="store_true", help="link-local destinations too")
    serving = parser.add_argument_group("serving")
    serving.add_argument("--healthz-bind-address", default="127.0.0.1:10270", metavar="HOST:PORT", help='"": off')
    serving.add_argument("--metrics-bind-address", default="127.0.0.1:10271", metavar="HOST:PORT", help='"": off')
    parser.add_argument("--cleanup", action="store_true", help="remove all that is ours from this machine, and end")
    lifecycle.add_common_flags(parser)
    return parser


def _serve(arguments: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    lifecycle.configure_logs("pynetd", args)
    args.state_dir = args.state_dir.absolute()
    if args.cleanup:
        return _clean(args) if _root() else 1
    try:
        source = source_from(args, {"Node"})
        events = events_from(args, "pynetd", args.node_name or socket.gethostname().lower())
    except NoSource as error:
        parser.error(str(error))
    try:
        allocation = _allocation(args)
    except BadPool as error:
        parser.error(str(error))
    if allocation:
        # who assigns needs Nodes as their authors wrote them
        source = Manifests(args.manifests, frozenset({"Node"}), assigned=False)
    lock = _locked(args.state_dir) if _root() else None
    if lock is None:
        return 1
    name = args.node_name or socket.gethostname().lower()
    options = Options(
        settings=Settings(
            name=name, backend=args.backend, vni=args.vxlan_vni, port=args.vxlan_port,
            cluster_cidrs=args.cluster_cidr, mtu=args.mtu,
        ),
        state_dir=args.state_dir, bridge=args.bridge, conf_dir=args.cni_conf_dir, resync=args.resync_period,
        non_masquerade=args.non_masquerade_cidrs, masquerade_link_local=args.masq_link_local,
        masquerade=args.masquerade, pools=allocation, ledger=Ledger(args.manifests) if allocation else None,
    )  # fmt: skip
    try:
        return _work(options, source, events, args.healthz_bind_address, args.metrics_bind_address)
    except (http.BindError, OSError) as error:
        log.error("cannot start", extra=logs.fields(error=error))
        return 1
    finally:
        os.close(lock)


def _root() -> bool:
    """Say whether the process may do what it is for; log it where it may not."""
    if os.geteuid() != 0:
        log.error("pynetd needs root: it writes routes, links and rules of this network namespace")
        return False
    if missing := privileges.lacking(_NEEDED):
        log.error("cannot start: capabilities are missing", extra=logs.fields(missing=missing))
    return not missing


def _clean(args: argparse.Namespace) -> int:
    there = args.state_dir.is_dir()
    lock = _locked(args.state_dir) if there else None
    if there and lock is None:
        return 1
    failed = False
    for what, became in clean(args.state_dir, args.cni_conf_dir, args.bridge):
        failed = failed or became.startswith("not removed")
        log.info("cleanup", extra=logs.fields(what=what, became=became))
    if lock is not None:
        (args.state_dir / status.LOCK).unlink(missing_ok=True)
        os.close(lock)
    return 1 if failed else 0


def _allocation(args: argparse.Namespace) -> tuple[Pool, ...]:
    """Return the pools that pod CIDRs are assigned from; none where that is not asked for. Raise `BadPool`."""
    if not args.allocate_node_cidrs:
        return ()
    if args.manifests is None:
        raise BadPool("--allocate-node-cidrs is for --manifests; a cluster's controller manager does it else")
    families = {family_of(cidr) for cidr in args.cluster_cidr}
    if args.node_cidr_mask_size is not None and len(families) > 1:
        raise BadPool("--node-cidr-mask-size is for one family; with two: --node-cidr-mask-size-ipv4 and -ipv6")
    either = args.node_cidr_mask_size
    asked = {4: args.node_cidr_mask_size_ipv4, 6: args.node_cidr_mask_size_ipv6}
    sizes = {family: either if size is None else size for family, size in asked.items()}
    return pools(args.cluster_cidr, {family: size for family, size in sizes.items() if size is not None})


def _work(options: Options, source: Source, events: Events, healthz: str, metrics_bind: str) -> int:
    stop = lifecycle.stop_on_signals()
    metrics = Metrics()
    with Rtnetlink() as kernel:
        watch = Watch()
        agent = Agent(options, metrics, kernel, events)
        servers = _http(agent, metrics, healthz, metrics_bind, options.state_dir)
        executable = Server(options.state_dir, on_request=metrics.cni_request)
        executable.start()
        log.info(
            "started",
            extra=logs.fields(
                node=options.settings.name, backend=options.settings.backend, state_dir=options.state_dir
            ),
        )
        threads = [
            threading.Thread(target=watch.run, args=(agent.on_event, kernel.port, stop), name="kernel", daemon=True),
            threading.Thread(target=source.run, args=(agent.on_batch, stop), name="source", daemon=True),
        ]
        if options.ledger is not None:
            following = (agent.on_record, stop)
            threads.append(threading.Thread(target=options.ledger.watch, args=following, name="record", daemon=True))
        glancing = (agent.on_glance, stop)
        threads.append(threading.Thread(target=agent.glances.watch, args=glancing, name="glance", daemon=True))
        threads.append(threading.Thread(target=_watchdog, args=(agent, stop), name="watchdog", daemon=True))
        for thread in threads:
            thread.start()
        agent.run(stop)
        lifecycle.notify("STOPPING=1")
        executable.close()
        events.close()
        for server in servers:
            server.close()
        # the threads only listen: they end with the process
    log.info("stopped")
    return 0


def _watchdog(agent: Agent, stop: threading.Event) -> None:
    """Tell the service manager, where it asks for that, that reconciling works."""
    period = lifecycle.watchdog_seconds()
    while period is not None and not stop.wait(period):
        since = agent.failing_since
        if since is None or time.monotonic() - since <= _FAILING_LIMIT:
            lifecycle.notify("WATCHDOG=1")


def _http(agent: Agent, metrics: Metrics, healthz: str, metrics_bind: str, state_dir: Path) -> list[http.Server]:
    """Serve health and metrics; on one server where both have the same address."""

    def alive() -> http.Reply:
        since = agent.failing_since
        if since is not None and time.monotonic() - since > _FAILING_LIMIT:
            return http.Reply(503, body=b"reconciling fails; see `pynetd status`\n")
        return http.Reply(200, body=b"ok\n")

    def ready() -> http.Reply:
        if agent.ready.is_set():
            return http.Reply(200, body=b"ok\n")
        return http.Reply(503, body=b"not ready: no reconcile was completed yet\n")

    health = {"/healthz": alive, "/livez": alive, "/readyz": ready}

    def measure() -> http.Reply:
        metrics.addresses.clear()
        for each in usage(with_room(agent.pod_cidrs), state_dir):
            metrics.addresses.labels(each.cidr, "used").set(each.used)
            metrics.addresses.labels(each.cidr, "free").set(each.free)
        return http.metrics_reply(metrics.registry)

    measured = {"/metrics": measure}
    if healthz == metrics_bind:
        servers = [http.serve(healthz, {**health, **measured})]
    else:
        servers = [http.serve(healthz, health), http.serve(metrics_bind, measured)]
    return [server for server in servers if server is not None]


def _locked(state_dir: Path) -> int | None:
    """Return the descriptor that holds the lock of `state_dir`, or None, said why, when another agent has it."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.error("--state-dir cannot be made", extra=logs.fields(state_dir=state_dir, error=error.strerror))
        return None
    path = state_dir / status.LOCK
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                pid = os.read(descriptor, 20).decode(errors="replace").strip()
                log.error("another pynetd serves this state directory", extra=logs.fields(state_dir=state_dir, pid=pid))
                os.close(descriptor)
                return None
            time.sleep(0.05)
        # taken by another one, or removed by a cleanup while we waited
        os.close(descriptor)


def _install(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pynetd install", description="Put the CNI executables where a runtime looks."
    )
    parser.add_argument("--cni-bin-dir", type=Path, default=Path("/opt/cni/bin"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(arguments)
    try:
        install(args.cni_bin_dir)
    except OSError as error:
        print(f"pynetd install: {error}", file=sys.stderr)
        return 1
    return 0


def _status(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="pynetd status", description="Print what this node's agent says of itself.")
    parser.add_argument("--state-dir", type=Path, default=STATE_DIR, metavar="DIR", help="(%(default)s)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args(arguments)
    file = args.state_dir / status.STATUS
    try:
        said = status.load(args.state_dir)
    except (OSError, ValueError) as error:
        print(f"pynetd status: {file} cannot be read: {error}", file=sys.stderr)
        return 1
    if said is None:
        print(f"pynetd status: no {file}: no agent has reconciled with that --state-dir yet", file=sys.stderr)
        return 1
    if args.output == "json":
        print(file.read_text())
    else:
        print(status.render(said, status.running(args.state_dir)), end="")
    return 0


def _cidrs(text: str) -> tuple[str, ...]:
    try:
        found = (str(ipaddress.ip_network(part.strip())) for part in text.split(",") if part.strip())
        return tuple(dict.fromkeys(found))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _duration(text: str) -> float:
    """Return seconds: `90`, `90s`, `1m30s`, `500ms`."""
    scale = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: expected as in 60s, 1m30s")
    seconds = sum(float(number) * scale[unit] for number, unit in parts)
    if seconds <= 0:
        raise argparse.ArgumentTypeError("must be above zero")
    return seconds


def _vni(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 1 << 24:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to 16777215")
    return int(text)


def _mtu(text: str) -> int:
    # 68: what every IPv4 link has to carry (RFC 791)
    if not text.isdigit() or not (text == "0" or 68 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 68 to 65535, or 0")
    return int(text)


def _link(text: str) -> str:
    if not re.fullmatch(r"[^\s/:]{1,15}", text) or text in (".", ".."):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name of a link: up to 15 characters without '/', ':' or space"
        )
    return text


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to 65535")
    return int(text)
