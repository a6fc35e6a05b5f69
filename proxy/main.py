"""The daemon `pyproxy`: what its command line asks for, the parts of `assembly` between a source and servers."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec
import yaml

from proxy import configfile, flags
from proxy.assembly import Parts, assembled, families_of_host
from proxy.cluster import KINDS
from proxy.config import ConfigError, Settings
from proxy.health import health_routes, metrics_routes
from proxy.inspect import command
from proxy.metrics import Metrics
from proxy.modes import ApplyError, Mode, registry
from proxy.node_setup import prepare
from proxy.zpages import zpages_routes
from pynet.daemon import lifecycle, logs, privileges
from pynet.daemon.http import BindError, Routes, Server, serve
from pynet.kernel import sysctl
from pynet.sources.events import Events
from pynet.sources.flags import NoSource, events_from, source_from

log = logs.get(__name__)
NEEDED = (privileges.NET_ADMIN, privileges.NET_RAW, privileges.NET_BIND_SERVICE)
INDISPENSABLE = {"iptables": NEEDED[:2], "ipvs": NEEDED[:2]}  # by mode; NET_ADMIN for the others


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `pyproxy`; return its exit code: 2 for what the command line or a file asks that cannot be."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["explain"]:
        return command.main(arguments[1:])
    try:
        args, settings = flags.parse(arguments)
    except ConfigError as error:
        print(f"pyproxy: {error}", file=sys.stderr)
        return 2
    lifecycle.configure_logs("pyproxy", args)
    ignored = flags.accepted_without_meaning(args)
    if ignored:
        log.info("flags without meaning here are ignored", extra=logs.fields(flags=" ".join(ignored)))
    if args.write_config_to:
        return write_config(args, settings)
    if args.cleanup:
        return cleanup(settings)
    prepare(settings)
    if args.init_only:
        return 0
    return run(args, settings)


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Serve until told to stop; return the exit code."""
    try:
        source = source_from(args, KINDS, node=settings.node_name)
        events = events_from(args, "pyproxy", settings.node_name)
        if missing := lacking(settings):
            log.error("cannot start: capabilities are missing", extra=logs.fields(missing=missing, mode=settings.mode))
            return 1
        mode = registry.made(settings)
    except (NoSource, ApplyError) as error:
        log.error(str(error))
        return 2
    if settings.drop_privileges and not privileges.keep_only(NEEDED):
        log.debug("privileges stay as they are: CAP_SETPCAP is missing")
    stop = lifecycle.stop_on_signals()
    parts = assembled(args.config, settings, source.kinds, mode, events, stop)
    tell_mode(settings, mode, parts.metrics, events)
    try:
        servers = served(args, settings, mode, parts)
    except BindError as error:
        log.error(str(error))
        return 2
    threading.Thread(target=source.run, args=(parts.engine.deliver, stop), name="source", daemon=True).start()
    log.info("started", extra=logs.fields(mode=mode.name, node=settings.node_name, version=lifecycle.version()))
    parts.runner.run(stop)
    lifecycle.notify("STOPPING=1")
    for each in (*parts.open, *servers, events):
        each.close()
    return 0


def lacking(settings: Settings) -> str:
    """Return which capabilities are missing without which the mode can write nothing; or ""."""
    if settings.mode == "userspace" and settings.userspace.listen_only:
        return ""
    return privileges.lacking(INDISPENSABLE.get(settings.mode, NEEDED[:1]))


def tell_mode(settings: Settings, mode: Mode, metrics: Metrics, events: Events) -> None:
    """Say which mode is in use, and that it is another than the one asked for; begin to count."""
    metrics.begin(families_of_host(), mode.name)
    metrics.mode.labels(mode.name, settings.mode).set(1)
    if isinstance(mode, CountsPackets):
        metrics.count_packets(mode.packets)
    if mode.name != settings.mode:
        events.emit(
            "ModeFallback", f"mode {settings.mode} cannot run on this node's kernel: {mode.name} is used instead"
        )


def served(args: argparse.Namespace, settings: Settings, mode: Mode, parts: Parts) -> Sequence[Server]:
    """Begin to answer on the health and the metrics address. Raise `BindError` where a failure is to be one."""
    asked = metrics_routes(parts.metrics, lambda: mode.name, lambda: configuration(args, settings))
    more = zpages_routes(flags.in_use(args, settings), tuple(asked))
    health = health_routes(parts.health, parts.metrics)
    pairs: tuple[tuple[str, Routes], ...] = (
        (settings.healthz_bind, health),
        (settings.metrics_bind, {**asked, **more}),
    )
    return [server for bind, routes in pairs if (server := serve_or_tell(settings, bind, routes))]


@runtime_checkable
class CountsPackets(Protocol):
    """A mode that counts packets in the kernel: the iptables mode."""

    def packets(self, what: str) -> int | None:
        """Return how many packets a constant rule has seen, of one of `metrics.PACKETS`; None: no such rule stands."""


@runtime_checkable
class LoopbackGuard(Protocol):
    """A mode that lets loopback addresses be routed, and guards them."""

    def guards_loopback(self) -> bool:
        """Whether its guard stands in the kernel."""


def serve_or_tell(settings: Settings, bind: str, routes: Routes) -> Server | None:
    """Serve, or say why not and go on, unless that is to be an error."""
    try:
        return serve(bind, routes)
    except BindError as error:
        if settings.bind_hard_fail:
            raise
        log.error(str(error))
        return None


def configuration(args: argparse.Namespace, settings: Settings) -> bytes:
    """Return the settings in use as JSON: kube-proxy's document under its name for it, and all of ours."""
    document = configfile.plain(configfile.document_from(settings, client_of(args)))
    return msgspec.json.format(msgspec.json.encode({"kubeproxy.config.k8s.io": document, "pynet": settings})) + b"\n"


def write_config(args: argparse.Namespace, settings: Settings) -> int:
    """Write the settings in use as a file that --config takes; return the exit code."""
    document = configfile.plain(configfile.document_from(settings, client_of(args)))
    try:
        args.write_config_to.write_text(yaml.safe_dump(document, sort_keys=False))
    except OSError as error:
        print(f"pyproxy: --write-config-to {args.write_config_to}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def client_of(args: argparse.Namespace) -> configfile.ClientConnection:
    """Return how the API server is reached, as the configuration file says it."""
    kubeconfig = str(args.kubeconfig) if args.kubeconfig else ""
    return configfile.ClientConnection(kubeconfig=kubeconfig, qps=args.kube_api_qps, burst=args.kube_api_burst)


def cleanup(settings: Settings) -> int:
    """Remove everything of ours in every mode; return the exit code."""
    failed = 0
    is_loopback_routed = False
    for name in registry.MODES:
        try:
            mode = registry.made(settings, name)
            is_loopback_routed = is_loopback_routed or (isinstance(mode, LoopbackGuard) and mode.guards_loopback())
            mode.cleanup()
        except Exception as error:  # the others are cleaned all the same
            if name == settings.mode:
                failed = 1
            log.warning("clean-up failed", extra=logs.fields(mode=name, error=error))
    if is_loopback_routed:
        sysctl.write("net/ipv4/conf/all/route_localnet", 0)
    return failed


if __name__ == "__main__":
    sys.exit(main())
