"""kube-proxy's configuration file, KubeProxyConfiguration v1alpha1, strictly: an unknown field is named and refused.

Knows the file's shape (kubeproxy.config.k8s.io/v1alpha1 of Kubernetes 1.36) and which setting each field is; writes the
file that means given settings as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from proxy.config import ConfigError, Settings
from proxy.values import duration, spelled

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"
Duration = str | int | float


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    pass


class ClientConnection(_Part, frozen=True):
    """How to reach the API server."""

    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = ""
    qps: float | None = None
    burst: int | None = None


class Logging(_Part, frozen=True):
    """Logs; of the component's options only the format and verbosity mean something here."""

    format: str = ""
    flush_frequency: Duration | None = None
    verbosity: int | None = None
    vmodule: Any = None
    options: Any = None


class Iptables(_Part, frozen=True):
    """KubeProxyIPTablesConfiguration."""

    masquerade_bit: int | None = None
    masquerade_all: bool | None = None
    localhost_node_ports: bool | None = None
    sync_period: Duration | None = None
    min_sync_period: Duration | None = None


class Nftables(_Part, frozen=True):
    """KubeProxyNFTablesConfiguration."""

    masquerade_bit: int | None = None
    masquerade_all: bool | None = None
    sync_period: Duration | None = None
    min_sync_period: Duration | None = None


class Ipvs(_Part, frozen=True):
    """KubeProxyIPVSConfiguration."""

    sync_period: Duration | None = None
    min_sync_period: Duration | None = None
    scheduler: str | None = None
    exclude_cidrs: tuple[str, ...] | None = msgspec.field(name="excludeCIDRs", default=None)
    strict_arp: bool | None = msgspec.field(name="strictARP", default=None)
    tcp_timeout: Duration | None = None
    tcp_fin_timeout: Duration | None = None
    udp_timeout: Duration | None = None


class Winkernel(_Part, frozen=True):
    """Windows only; accepted, without meaning."""

    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = msgspec.field(name="enableDSR", default=False)
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = msgspec.field(name="forwardHealthCheckVip", default=False)


class DetectLocal(_Part, frozen=True):
    """DetectLocalConfiguration."""

    bridge_interface: str | None = None
    interface_name_prefix: str | None = None


class Conntrack(_Part, frozen=True):
    """KubeProxyConntrackConfiguration."""

    max_per_core: int | None = None
    min: int | None = None
    tcp_established_timeout: Duration | None = None
    tcp_close_wait_timeout: Duration | None = None
    tcp_be_liberal: bool | None = None
    udp_timeout: Duration | None = None
    udp_stream_timeout: Duration | None = None


class Document(_Part, frozen=True):
    """The whole file."""

    api_version: str
    kind: str
    feature_gates: dict[str, bool] | None = None
    client_connection: ClientConnection | None = None
    logging: Logging | None = None
    hostname_override: str | None = None
    bind_address: str | None = None
    healthz_bind_address: str | None = None
    metrics_bind_address: str | None = None
    bind_address_hard_fail: bool | None = None
    enable_profiling: bool | None = None
    show_hidden_metrics_for_version: str | None = None
    mode: str | None = None
    iptables: Iptables | None = msgspec.field(name="iptables", default=None)
    ipvs: Ipvs | None = None
    winkernel: Winkernel | None = None
    nftables: Nftables | None = msgspec.field(name="nftables", default=None)
    detect_local_mode: str | None = None
    detect_local: DetectLocal | None = None
    cluster_cidr: str | None = msgspec.field(name="clusterCIDR", default=None)
    node_port_addresses: tuple[str, ...] | None = None
    oom_score_adj: int | None = None
    conntrack: Conntrack | None = None
    config_sync_period: Duration | None = None
    port_range: str | None = None
    windows_run_as_service: bool | None = None


def read(path: Path) -> Document:
    """Return the file's contents. Raise `ConfigError` that names the file and the field."""
    try:
        raw = yaml.load(path.read_text(), Loader=_UniqueKeys)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    return document_of(raw, str(path))


def document_of(raw: Any, origin: str) -> Document:
    """Return the decoded file as a `Document`. Raise `ConfigError`."""
    if not isinstance(raw, dict) or raw.get("apiVersion") != API_VERSION or raw.get("kind") != KIND:
        raise ConfigError(f"--config {origin}: expected apiVersion {API_VERSION}, kind {KIND}")
    try:
        return msgspec.convert(raw, Document)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        field = place.rstrip("`").lstrip(".")
        raise ConfigError(f"--config {origin}: {field + ': ' if field else ''}{reason}") from None


def settings_of(document: Document) -> dict[str, Any]:
    """Return the settings that the file names, by the names that flags use (see `flags.FLAGS`)."""
    mode = document.mode or "iptables"
    iptables = document.iptables or Iptables()
    nftables = document.nftables or Nftables()
    ipvs = document.ipvs or Ipvs()
    by_mode: dict[str, Iptables | Nftables | Ipvs] = {"nftables": nftables, "ipvs": ipvs}
    own = by_mode.get(mode, iptables)
    rules = nftables if mode == "nftables" else iptables
    conntrack = document.conntrack or Conntrack()
    local = document.detect_local or DetectLocal()
    named: dict[str, Any] = {
        "mode": document.mode,
        "node_name": document.hostname_override,
        "bind_address": document.bind_address,
        "healthz_bind": document.healthz_bind_address,
        "metrics_bind": document.metrics_bind_address,
        "bind_hard_fail": document.bind_address_hard_fail,
        "detect_local_mode": document.detect_local_mode,
        "cluster_cidrs": _split(document.cluster_cidr),
        "pod_bridge": local.bridge_interface,
        "pod_interface_prefix": local.interface_name_prefix,
        "node_port_addresses": document.node_port_addresses,
        "masquerade_all": rules.masquerade_all,
        "masquerade_bit": rules.masquerade_bit,
        "localhost_node_ports": iptables.localhost_node_ports,
        # kubeadm writes 0s for every period; kube-proxy takes that for the default
        "sync_seconds": _seconds("syncPeriod", own.sync_period) or None,
        "min_sync_seconds": _seconds("minSyncPeriod", own.min_sync_period) or None,
        "oom_score_adj": document.oom_score_adj,
        "conntrack.max_per_core": conntrack.max_per_core,
        "conntrack.min": conntrack.min,
        "conntrack.tcp_established_seconds": _seconds("tcpEstablishedTimeout", conntrack.tcp_established_timeout),
        "conntrack.tcp_close_wait_seconds": _seconds("tcpCloseWaitTimeout", conntrack.tcp_close_wait_timeout),
        "conntrack.tcp_be_liberal": conntrack.tcp_be_liberal,
        "conntrack.udp_seconds": _seconds("udpTimeout", conntrack.udp_timeout),
        "conntrack.udp_stream_seconds": _seconds("udpStreamTimeout", conntrack.udp_stream_timeout),
        "ipvs.scheduler": ipvs.scheduler,
        "ipvs.exclude_cidrs": ipvs.exclude_cidrs,
        "ipvs.strict_arp": ipvs.strict_arp,
        "ipvs.tcp_seconds": _seconds("tcpTimeout", ipvs.tcp_timeout),
        "ipvs.tcp_fin_seconds": _seconds("tcpFinTimeout", ipvs.tcp_fin_timeout),
        "ipvs.udp_seconds": _seconds("udpTimeout", ipvs.udp_timeout),
        "feature_gates": document.feature_gates,
    }
    # An empty text in the file is the absence of a value, as kube-proxy's defaulting takes it.
    return {name: value for name, value in named.items() if value is not None and value != ""}


def document_from(settings: Settings, client: ClientConnection) -> Document:
    """Return the file that means `settings`, all fields named; what only we have (see `flags`) has no place in it."""
    periods: dict[str, Any] = {
        "sync_period": _span(settings.sync_seconds),
        "min_sync_period": _span(settings.min_sync_seconds),
    }
    rules: dict[str, Any] = {
        "masquerade_bit": settings.masquerade_bit,
        "masquerade_all": settings.masquerade_all,
        **periods,
    }
    conntrack, ipvs = settings.conntrack, settings.ipvs
    return Document(
        api_version=API_VERSION,
        kind=KIND,
        feature_gates=settings.feature_gates,
        client_connection=client,
        hostname_override=settings.node_name,
        bind_address=settings.bind_address,
        healthz_bind_address=settings.healthz_bind,
        metrics_bind_address=settings.metrics_bind,
        bind_address_hard_fail=settings.bind_hard_fail,
        mode=settings.mode,
        iptables=Iptables(localhost_node_ports=settings.localhost_node_ports, **rules),
        ipvs=Ipvs(
            scheduler=ipvs.scheduler,
            exclude_cidrs=ipvs.exclude_cidrs,
            strict_arp=ipvs.strict_arp,
            tcp_timeout=_span(ipvs.tcp_seconds),
            tcp_fin_timeout=_span(ipvs.tcp_fin_seconds),
            udp_timeout=_span(ipvs.udp_seconds),
            **periods,
        ),
        nftables=Nftables(**rules),
        detect_local_mode=settings.detect_local_mode,
        detect_local=DetectLocal(settings.pod_bridge, settings.pod_interface_prefix),
        cluster_cidr=",".join(settings.cluster_cidrs),
        node_port_addresses=settings.node_port_addresses,
        oom_score_adj=settings.oom_score_adj,
        conntrack=Conntrack(
            max_per_core=conntrack.max_per_core,
            min=conntrack.min,
            tcp_established_timeout=_span(conntrack.tcp_established_seconds),
            tcp_close_wait_timeout=_span(conntrack.tcp_close_wait_seconds),
            tcp_be_liberal=conntrack.tcp_be_liberal,
            udp_timeout=_span(conntrack.udp_seconds),
            udp_stream_timeout=_span(conntrack.udp_stream_seconds),
        ),
    )


def plain(document: Document) -> dict[str, Any]:
    """Return a document as YAML and JSON have it, without the fields that say nothing."""
    return {name: value for name, value in msgspec.to_builtins(document).items() if value is not None}


def _span(seconds: float | None) -> str | None:
    return None if seconds is None else spelled(seconds, is_duration=True)


def _split(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else None


def _seconds(field: str, value: Duration | None) -> float | None:
    if value is None:
        return None
    try:
        return duration(str(value))
    except ValueError as error:
        raise ConfigError(f"--config: {field}: {error}") from None


class _UniqueKeys(yaml.CSafeLoader):
    """YAML in which a key that stands twice is an error, as in kube-proxy's strict decoding."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)
