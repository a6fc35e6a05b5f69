"""What the proxy counts: kube-proxy's names and labels, so that dashboards keep working, and a few of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from proxy.plan import Family

_SYNC_BUCKETS = [0.001 * 2**power for power in range(15)]
_PROGRAMMING_BUCKETS = [0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30)]
_FAMILY = ["ip_family"]
# what a mode's constant rules count: kube-proxy's names, read when they are asked for
PACKETS = {
    "iptables_ct_state_invalid_dropped_packets": "Packets that conntrack calls invalid, dropped when forwarded",
    "iptables_localhost_nodeports_accepted_packets": "Connections to node ports on loopback addresses",
}


class _Packets(Collector):
    """Counters that the kernel keeps."""

    def __init__(self, packets: Callable[[str], int | None]) -> None:
        self._packets = packets

    def describe(self) -> Iterable[Metric]:
        return [CounterMetricFamily(f"kubeproxy_{name}", text) for name, text in PACKETS.items()]

    def collect(self) -> Iterable[Metric]:
        for name, text in PACKETS.items():
            count = self._packets(name)
            yield CounterMetricFamily(f"kubeproxy_{name}", text, value=count)


class Metrics:
    """All metrics of one daemon, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def histogram(name: str, text: str, labels: list[str], buckets: list[float]) -> Histogram:
            return Histogram(f"kubeproxy_{name}", text, labels, registry=registry, buckets=buckets)

        def gauge(name: str, text: str, labels: list[str] | None = None) -> Gauge:
            return Gauge(f"kubeproxy_{name}", text, labels or [], registry=registry)

        def counter(name: str, text: str, labels: list[str] | None = None) -> Counter:
            return Counter(f"kubeproxy_{name}", text, labels or [], registry=registry)

        self.sync_seconds = histogram("sync_proxy_rules_duration_seconds", "Time of a sync", _FAMILY, _SYNC_BUCKETS)
        self.full_sync_seconds = histogram(
            "sync_full_proxy_rules_duration_seconds", "Time of a full sync", _FAMILY, _SYNC_BUCKETS
        )
        self.partial_sync_seconds = histogram(
            "sync_partial_proxy_rules_duration_seconds", "Time of a partial sync", _FAMILY, _SYNC_BUCKETS
        )
        self.programming_seconds = histogram(
            "network_programming_duration_seconds",
            "Time from the change of an endpoint to the rules that know it",
            _FAMILY,
            [float(bucket) for bucket in _PROGRAMMING_BUCKETS],
        )
        self.last_sync = gauge("sync_proxy_rules_last_timestamp_seconds", "Last success of a sync", _FAMILY)
        self.last_queued = gauge("sync_proxy_rules_last_queued_timestamp_seconds", "Last time a sync was due", _FAMILY)
        self.endpoint_changes = counter("sync_proxy_rules_endpoint_changes", "Changes of endpoints", _FAMILY)
        self.service_changes = counter("sync_proxy_rules_service_changes", "Changes of Services", _FAMILY)
        self.endpoint_changes_pending = gauge(
            "sync_proxy_rules_endpoint_changes_pending", "Changes of endpoints not written yet", _FAMILY
        )
        self.service_changes_pending = gauge(
            "sync_proxy_rules_service_changes_pending", "Changes of Services not written yet", _FAMILY
        )
        self.iptables_total = gauge(
            "sync_proxy_rules_iptables_total", "Rules of the iptables mode", ["table", *_FAMILY]
        )
        self.iptables_last = gauge(
            "sync_proxy_rules_iptables_last", "Rules written by the last sync", ["table", *_FAMILY]
        )
        self.iptables_failures = counter(
            "sync_proxy_rules_iptables_restore_failures", "Failures of iptables-restore", _FAMILY
        )
        self.iptables_partial_failures = counter(
            "sync_proxy_rules_iptables_partial_restore_failures", "Failures of a partial iptables-restore", _FAMILY
        )
        self.nftables_failures = counter("sync_proxy_rules_nftables_sync_failures", "Failures of nft", _FAMILY)
        self.nftables_cleanup_failures = counter(
            "sync_proxy_rules_nftables_cleanup_failures", "Failures of removing nftables rules", _FAMILY
        )
        self.no_local_endpoints = gauge(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with a Local policy and no local endpoint",
            ["traffic_policy", *_FAMILY],
        )
        self.healthz = counter("proxy_healthz", "Answers of /healthz", ["code"])
        self.livez = counter("proxy_livez", "Answers of /livez", ["code"])
        self.conntrack_seconds = histogram(
            "conntrack_reconciler_sync_duration_seconds", "Time of removing stale flows", _FAMILY, _SYNC_BUCKETS
        )
        self.conntrack_deleted = counter(
            "conntrack_reconciler_deleted_entries", "Stale flows that were removed", _FAMILY
        )
        self.mode = Gauge("pyproxy_mode", "The mode in use is 1", ["mode", "asked_for"], registry=registry)
        self.services = Gauge("pyproxy_services", "Services that are served", registry=registry)
        self.servers = Gauge("pyproxy_service_ports", "Service ports that are served", _FAMILY, registry=registry)
        self.quarantined = Gauge(
            "pyproxy_quarantined_service_ports", "Service ports that the kernel refused", _FAMILY, registry=registry
        )
        self.bad_objects = Counter("pyproxy_bad_objects", "Objects that could not be read", registry=registry)
        self.audits = Counter("pyproxy_audits", "Comparisons with the kernel", registry=registry)
        self.drift = Counter("pyproxy_drift", "Differences that an audit repaired", registry=registry)
        self.tampered = Counter("pyproxy_tampered", "Times that our rules were found removed", registry=registry)
        self.refused = Gauge(
            "pyproxy_refused_packets",
            "First packets of connections refused or dropped in the last day, in nftables mode",
            ["reason", *_FAMILY],
            registry=registry,
        )
        self.contests = Gauge("pyproxy_contested_frontends", "Addresses that two Services claim", registry=registry)

    def begin(self, families: Iterable[Family], mode: str) -> None:
        """Let everything be counted from zero that `mode` counts: what is not there cannot be asked for its rate."""
        of_mode = {
            "iptables": (self.iptables_failures, self.iptables_partial_failures),
            "nftables": (self.nftables_failures, self.nftables_cleanup_failures),
        }
        always = (
            self.sync_seconds, self.full_sync_seconds, self.partial_sync_seconds, self.programming_seconds,
            self.last_sync, self.last_queued, self.endpoint_changes, self.service_changes,
            self.endpoint_changes_pending, self.service_changes_pending, self.conntrack_seconds, self.conntrack_deleted,
        )  # fmt: skip
        for family in families:
            for metric in (*always, *of_mode.get(mode, ())):
                metric.labels(family.value)
        for code in ("200", "503"):
            self.healthz.labels(code)
            self.livez.labels(code)

    def count_packets(self, packets: Callable[[str], int | None]) -> None:
        """Ask `packets` for each of `PACKETS` whenever the metrics are read."""
        self.registry.register(_Packets(packets))

    def changed(self, family: Family, services: int, endpoints: int) -> None:
        """Count changes of objects that came in and are not written yet."""
        self.service_changes.labels(family.value).inc(services)
        self.service_changes_pending.labels(family.value).inc(services)
        self.endpoint_changes.labels(family.value).inc(endpoints)
        self.endpoint_changes_pending.labels(family.value).inc(endpoints)

    def nothing_pending(self, family: Family) -> None:
        """Note that all changes are written."""
        self.service_changes_pending.labels(family.value).set(0)
        self.endpoint_changes_pending.labels(family.value).set(0)
