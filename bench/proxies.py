"""What the proxy's benchmarks share: a mode by name, and the way from a changed object to the kernel."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable

import msgspec
from cluster import endpoint_slice, objects

from proxy.cluster import KINDS, Cluster
from proxy.config import Settings
from proxy.modes import Mode, registry
from proxy.plan import Family, LocalDetector, LocalKind, NodeSettings
from proxy.planning import Planner, Surroundings
from pynet.objects import Object
from pynet.sources import Batch

MODES = ("iptables-legacy", "iptables-nft", "nftables")
POD_CIDR = "10.128.0.0/9"
ENDPOINT_KINDS = frozenset({"Service", "EndpointSlice"})


def mode_settings(mode: str) -> Settings:
    """Return the daemon's settings for `iptables-legacy`, `iptables-nft` or `nftables`."""
    name, _, backend = mode.partition("-")
    return Settings(mode=name, iptables_backend=backend, node_name="bench", cluster_cidrs=(POD_CIDR,))


class Times(msgspec.Struct):
    """Seconds of one pass."""

    decide: float
    render: float
    apply: float
    total: float


class Pipeline:
    """Objects → plan → kernel, in this process and this namespace, for IPv4."""

    def __init__(self, mode: str) -> None:
        self.mode: Mode = registry.made(mode_settings(mode))
        self.cluster = Cluster("bench")
        settings = NodeSettings("bench", LocalDetector(LocalKind.CIDR, (POD_CIDR,)))
        self.planner = Planner(Family.V4, Surroundings(settings))

    def cold(self, found: Iterable[Object]) -> Times:
        """Take in a whole cluster and make the kernel equal to it."""
        batch = Batch(tuple(found), replaced=KINDS)
        begin = time.perf_counter()
        touched = self.cluster.apply(batch)
        assert not touched.bad, touched.bad[:3]
        plan = self.planner.update(self.cluster, touched.services).new
        decided = time.perf_counter()
        written = self.mode.sync([plan])
        return self._times(begin, decided, written.render_seconds, written.apply_seconds)

    def change(self, *changed: Object) -> Times:
        """Take in changed objects and write the difference."""
        begin = time.perf_counter()
        touched = self.cluster.apply(Batch(changed))
        change = self.planner.update(self.cluster, touched.services)
        decided = time.perf_counter()
        written = self.mode.update([change])
        return self._times(begin, decided, written.render_seconds, written.apply_seconds)

    @staticmethod
    def _times(begin: float, decided: float, render: float, apply: float) -> Times:
        return Times(decided - begin, render, apply, time.perf_counter() - begin)


def loaded(mode: str, services: int, endpoints: int) -> tuple[Pipeline, Times]:
    """Return a pipeline with a cluster of that size in the kernel, and how long that took."""
    pipeline = Pipeline(mode)
    found = list(objects(services, endpoints))
    times = pipeline.cold(found)
    del found
    gc.collect()
    return pipeline, times


def one_endpoint_change(pipeline: Pipeline, number: int, endpoints: int, shift: int) -> Times:
    """Replace the last endpoint of one Service."""
    return pipeline.change(endpoint_slice(number, endpoints, shift))
