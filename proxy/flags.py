"""pyproxy's flags: kube-proxy's as they are, and a few of our own; a table, and the settings that a command line means.

A flag that is given wins over the configuration file, which wins over the defaults. Flags of kube-proxy that have no
meaning here are accepted and named in one log line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from proxy import configfile
from proxy.config import DETECT_MODES, MODES, ConfigError, Settings, checked
from proxy.values import boolean, duration, gates, spelled, texts
from pynet.daemon.lifecycle import add_common_flags
from pynet.sources.flags import add_source_flags

UNSET: Any = None


class Flag(msgspec.Struct, frozen=True):
    """One flag. `setting`: the field of `Settings` (with a dot: of one of its parts). `only_in`: has a meaning in that
    mode alone, and there more weight than the flags before it.
    """

    names: tuple[str, ...]
    setting: str
    read: Callable[[str], Any]
    help: str
    metavar: str = ""
    only_in: str = ""


_MODE = Flag(("--mode", "--proxy-mode"), "mode", str, f"how the kernel is programmed: {', '.join(MODES)}", "MODE")
_KUBE = (
    _MODE,
    Flag(("--hostname-override",), "node_name", str, "name of this node (default: the host's name)", "NAME"),
    Flag(("--bind-address",), "bind_address", str, "the node's own IP address, where the Node object is wrong", "IP"),
    Flag(("--healthz-bind-address",), "healthz_bind", str, "address of /healthz and /livez (0.0.0.0:10256)", "ADDR"),
    Flag(
        ("--metrics-bind-address",), "metrics_bind", str, "address of /metrics and its like (127.0.0.1:10249)", "ADDR"
    ),
    Flag(("--bind-address-hard-fail",), "bind_hard_fail", boolean, "exit when one of these cannot be served on"),
    Flag(
        ("--detect-local-mode",),
        "detect_local_mode",
        str,
        f"how pods' traffic is known: {', '.join(DETECT_MODES)}",
        "MODE",
    ),
    Flag(("--cluster-cidr",), "cluster_cidrs", texts, "network(s) of all pods, with commas", "CIDR[,CIDR]"),
    Flag(("--pod-bridge-interface",), "pod_bridge", str, "bridge of the pods, for BridgeInterface", "NAME"),
    Flag(
        ("--pod-interface-name-prefix",),
        "pod_interface_prefix",
        str,
        "how pods' interfaces begin, for InterfaceNamePrefix",
        "TEXT",
    ),
    Flag(
        ("--nodeport-addresses",),
        "node_port_addresses",
        texts,
        "networks whose local addresses serve node ports; also primary, localhost, all (default: all)",
        "CIDR,…",
    ),
    Flag(("--masquerade-all",), "masquerade_all", boolean, "masquerade all traffic to cluster IPs"),
    Flag(("--iptables-masquerade-bit",), "masquerade_bit", int, "bit of the packet mark that is ours (14)", "N"),
    Flag(
        ("--iptables-localhost-nodeports",),
        "localhost_node_ports",
        boolean,
        "node ports answer on 127.0.0.1 too (true)",
    ),
    Flag(("--iptables-sync-period",), "sync_seconds", duration, "time between checks (30s)", "TIME"),
    Flag(
        ("--iptables-min-sync-period",),
        "min_sync_seconds",
        duration,
        "least time from the end of one write to the next (100ms)",
        "TIME",
    ),
    Flag(("--ipvs-sync-period",), "sync_seconds", duration, "the same in IPVS mode", "TIME", "ipvs"),
    Flag(("--ipvs-min-sync-period",), "min_sync_seconds", duration, "the same in IPVS mode", "TIME", "ipvs"),
    Flag(("--ipvs-scheduler",), "ipvs.scheduler", str, "scheduler of the IPVS mode (rr)", "NAME"),
    Flag(("--ipvs-exclude-cidrs",), "ipvs.exclude_cidrs", texts, "virtual servers that are not ours", "CIDR,…"),
    Flag(("--ipvs-strict-arp",), "ipvs.strict_arp", boolean, "answer ARP only for addresses of the interface"),
    Flag(("--ipvs-tcp-timeout",), "ipvs.tcp_seconds", duration, "idle TCP connections (0: as it is)", "TIME"),
    Flag(("--ipvs-tcpfin-timeout",), "ipvs.tcp_fin_seconds", duration, "TCP after FIN (0: as it is)", "TIME"),
    Flag(("--ipvs-udp-timeout",), "ipvs.udp_seconds", duration, "idle UDP (0: as it is)", "TIME"),
    Flag(("--oom-score-adj",), "oom_score_adj", int, "this process's oom_score_adj (-999)", "N"),
    Flag(
        ("--conntrack-max-per-core",),
        "conntrack.max_per_core",
        int,
        "tracked connections for each CPU (32768; 0: as it is)",
        "N",
    ),
    Flag(("--conntrack-min",), "conntrack.min", int, "least number of tracked connections (131072)", "N"),
    Flag(
        ("--conntrack-tcp-timeout-established",),
        "conntrack.tcp_established_seconds",
        duration,
        "idle established TCP (24h; 0: as it is)",
        "TIME",
    ),
    Flag(
        ("--conntrack-tcp-timeout-close-wait",),
        "conntrack.tcp_close_wait_seconds",
        duration,
        "TCP in CLOSE_WAIT (1h; 0: as it is)",
        "TIME",
    ),
    Flag(
        ("--conntrack-tcp-be-liberal",),
        "conntrack.tcp_be_liberal",
        boolean,
        "accept out-of-window TCP packets, and drop no INVALID ones",
    ),
    Flag(("--conntrack-udp-timeout",), "conntrack.udp_seconds", duration, "idle UDP (0: as it is)", "TIME"),
    Flag(("--conntrack-udp-timeout-stream",), "conntrack.udp_stream_seconds", duration, "idle UDP streams (0)", "TIME"),
    Flag(("--feature-gates",), "feature_gates", gates, "accepted; none changes anything here", "NAME=BOOL,…"),
)
_OWN = (
    Flag(("--scheduler",), "scheduler", str, "how endpoints are chosen: random (default) or rr", "NAME"),
    Flag(
        ("--iptables-backend",), "iptables_backend", str, "legacy or nft (default: the one that the host uses)", "NAME"
    ),
    Flag(("--audit-period",), "audit_seconds", duration, "time between comparisons with the kernel (60s)", "TIME"),
    Flag(("--hold-node-ports",), "hold_node_ports", boolean, "bind every node port, so that nothing else takes it"),
    Flag(("--state-file",), "state_file", str, "last known good state, for a start without any source", "FILE"),
    Flag(("--drop-privileges",), "drop_privileges", boolean, "keep only the capabilities that are needed (true)"),
    Flag(
        ("--ipvs-fallback",),
        "ipvs.fallback",
        str,
        "mode where the kernel has no IPVS: iptables (default), none",
        "MODE",
    ),
    Flag(
        ("--userspace-listen-only",), "userspace.listen_only", boolean, "userspace mode: node ports only, unprivileged"
    ),
    Flag(
        ("--userspace-localhost-nodeports",),
        "userspace.localhost",
        boolean,
        "node ports on 127.0.0.1 and ::1 through the userspace proxy, in any mode",
    ),
    Flag(
        ("--userspace-max-connections",),
        "userspace.max_connections",
        int,
        "userspace mode: connections at once; more wait (20000)",
        "N",
    ),
    Flag(("--ipvs-drain-limit",), "ipvs.drain_seconds", duration, "longest drain of a removed endpoint (1h)", "TIME"),
    Flag(("--userspace-udp-idle",), "userspace.udp_idle_seconds", duration, "userspace mode: idle UDP (60s)", "TIME"),
)
_ACCEPTED = (
    "--bind-address-hard-fail-disabled", "--config-sync-period", "--healthz-port", "--metrics-port", "--profiling",
    "--show-hidden-metrics-for-version", "--log-flush-frequency", "--vmodule", "--alsologtostderr",
    "--log-dir", "--logtostderr", "--log-json-split-stream", "--log-json-info-buffer-size",
    "--log-text-split-stream", "--log-text-info-buffer-size", "--proxy-port-range", "--udp-timeout",
    "--add-dir-header", "--log-backtrace-at", "--log-file", "--log-file-max-size", "--one-output", "--skip-headers",
    "--skip-log-headers", "--stderrthreshold",
)  # fmt: skip
FLAGS = _KUBE + _OWN


def parser() -> argparse.ArgumentParser:
    """Return the parser of pyproxy's command line."""
    made = argparse.ArgumentParser(
        prog="pyproxy",
        description="Makes Kubernetes Services work on this node: programs the kernel so that traffic to a Service's "
        "addresses reaches one of its endpoints. Takes kube-proxy's flags and configuration file.",
        epilog="Example: pyproxy --mode=iptables --manifests ./manifests --cluster-cidr 10.244.0.0/16",
        allow_abbrev=False,
    )
    made.add_argument("--config", type=Path, metavar="FILE", help="KubeProxyConfiguration v1alpha1; flags win over it")
    made.add_argument("--write-config-to", type=Path, metavar="FILE", help="write the settings in use there and exit")
    made.add_argument("--cleanup", nargs="?", const=True, type=boolean, help="remove all rules of pyproxy and exit")
    made.add_argument("--init-only", nargs="?", const=True, type=boolean, help="set sysctls and the like, and exit")
    for flag in FLAGS:
        options: dict[str, Any] = {"type": _named(flag.read), "help": flag.help, "dest": flag.names[0]}
        if flag.read is boolean:
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        else:
            options["metavar"] = flag.metavar
        made.add_argument(*flag.names, **options)
    for name in _ACCEPTED:
        made.add_argument(name, nargs="?", const="true", dest=f"accepted {name}", help=argparse.SUPPRESS)
    add_source_flags(made)
    add_common_flags(made)
    return made


def _named(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return `read` so that argparse prints the reason it gives."""

    def reading(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return reading


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """Return the command line and the settings it means. Raise `ConfigError`; exits on --help and usage errors."""
    args = parser().parse_args([*map(dashed, sys.argv[1:] if arguments is None else arguments)])
    named: dict[str, Any] = {}
    if args.config is not None:
        document = configfile.read(args.config)
        named.update(configfile.settings_of(document))
        _source_from_file(args, document)
    mode = getattr(args, _MODE.names[0]) or named.get("mode")
    for flag in FLAGS:
        value = getattr(args, flag.names[0])
        is_given = value is not None and (value != "" or flag is not _MODE)  # kube-proxy: an empty mode is the default
        if is_given and flag.only_in in ("", mode):
            named[flag.setting] = value
    return args, checked(settings_from(named))


def dashed(argument: str) -> str:
    """Return an argument with `-` for `_` in a flag's name: kube-proxy takes both."""
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if name.startswith("--") else argument


def settings_from(named: dict[str, Any]) -> Settings:
    """Return settings from values by name (`field` or `part.field`); what is not named is the default."""
    parts: dict[str, dict[str, Any]] = {}
    fields: dict[str, Any] = {}
    for name, value in named.items():
        part, dot, field = name.partition(".")
        if dot:
            parts.setdefault(part, {})[field] = value
        else:
            fields[name] = value
    defaults = Settings()
    for part, values in parts.items():
        fields[part] = msgspec.structs.replace(getattr(defaults, part), **values)
    fields["mode_is_default"] = "mode" not in fields
    fields.setdefault("node_name", os.uname().nodename.split(".")[0].lower())
    fields["node_name"] = fields["node_name"].strip().lower()
    if not fields["node_name"]:
        raise ConfigError("--hostname-override: empty")
    return Settings(**fields)


def in_use(args: argparse.Namespace, settings: Settings) -> dict[str, str]:
    """Return every flag by name (without dashes) and the value in use, from whatever place it came."""
    found = {
        name.replace("_", "-"): spelled(value)
        for name, value in vars(args).items()
        if not name.startswith("accepted ") and name not in {flag.names[0] for flag in FLAGS}
    }
    for flag in FLAGS:
        value: Any = settings
        for part in flag.setting.split("."):
            value = getattr(value, part)
        found |= {name.lstrip("-"): spelled(value, is_duration=flag.read is duration) for name in flag.names}
    return found


def accepted_without_meaning(args: argparse.Namespace) -> list[str]:
    """Return the flags that were given and do nothing here."""
    return [name for name in _ACCEPTED if getattr(args, f"accepted {name}") is not None]


def _source_from_file(args: argparse.Namespace, document: configfile.Document) -> None:
    """Let the file name the API server where the command line names no source."""
    client = document.client_connection
    if client is not None and client.kubeconfig and args.manifests is None and args.kubeconfig is None:
        args.kubeconfig = Path(client.kubeconfig)
    if client is not None and args.kube_api_qps is None:
        args.kube_api_qps = client.qps or None
    if client is not None and args.kube_api_burst is None:
        args.kube_api_burst = client.burst or None
