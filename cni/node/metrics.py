"""The agent's metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pynet.netstate import Route, family_of


class Metrics:
    """One registry and what is in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.wanted = Gauge("pynetd_routes_wanted", "Routes that should be there", ["family"], registry=own)
        self.present = Gauge("pynetd_routes_present", "Routes of ours that are there", ["family"], registry=own)
        self.repaired = Counter(
            "pynetd_routes_repaired", "Routes put back or removed though no Node had changed", registry=own
        )
        self.changes = Counter("pynetd_route_changes", "Routes added, replaced, deleted", ["verb"], registry=own)
        self.refused = Gauge("pynetd_routes_refused", "Routes and entries that the kernel refused", registry=own)
        self.foreign = Gauge("pynetd_foreign_routes", "Foreign routes in the way of ours", registry=own)
        self.peers = Gauge("pynetd_peers", "Pod CIDRs of other nodes by how they are reached", ["how"], registry=own)
        self.problems = Gauge("pynetd_problems", "Problems that `pynetd status` tells", registry=own)
        self.reconciles = Counter("pynetd_reconciles", "Reconciles by outcome", ["outcome"], registry=own)
        self.seconds = Histogram(
            "pynetd_reconcile_seconds", "Time that a reconcile took",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5), registry=own,
        )  # fmt: skip
        self.last = Gauge("pynetd_last_reconcile_timestamp_seconds", "When one last succeeded", registry=own)
        self.cni_requests = Counter("pynetd_cni_requests", "Requests of pynet-cni", ["verb", "code"], registry=own)
        self.cni_seconds = Histogram(
            "pynetd_cni_request_seconds", "Time that a request of the CNI executable took", ["verb"],
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5), registry=own,
        )  # fmt: skip
        self.addresses = Gauge("pynetd_ipam_addresses", "Pod addresses", ["cidr", "state"], registry=own)
        for family in ("4", "6"):
            self.wanted.labels(family)
            self.present.labels(family)
        for verb in ("added", "replaced", "deleted"):
            self.changes.labels(verb)
        for how in ("direct", "vxlan", "none"):
            self.peers.labels(how)

    def routes(self, wanted: Iterable[Route], present: Iterable[Route]) -> None:
        """Say how many routes should be there, and how many are."""
        for gauge, routes in ((self.wanted, list(wanted)), (self.present, list(present))):
            for family in (4, 6):
                gauge.labels(str(family)).set(sum(family_of(route.dst) == family for route in routes))

    def cni_request(self, verb: str, code: int, seconds: float) -> None:
        """Count a request of the executable; `code` 0 is success."""
        self.cni_requests.labels(verb, str(code)).inc()
        self.cni_seconds.labels(verb).observe(seconds)
