"""The servers on healthCheckNodePorts: they tell a load balancer whether this node has endpoints of a Service.

Ready endpoints of this node count, terminating ones do not: the balancer turns away while they still answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence

import msgspec

from proxy.cluster import Cluster
from proxy.endpoints import found_for, ready_local_count
from proxy.plan import Family, NodeSettings, PlanChange, inside
from proxy.services import canonical_address
from pynet.daemon import logs
from pynet.daemon.http import BindError, Reply, Server, serve
from pynet.objects import Service
from pynet.sources.events import Events

log = logs.get(__name__)
WEIGHT_HEADER = "X-Load-Balancing-Endpoint-Weight"
Handler = Callable[[], Reply]


class Check(msgspec.Struct, frozen=True):
    """What one Service's server says."""

    port: int
    local_endpoints: int


class _AnyPath(dict[str, Handler]):
    """One answer, whatever the path."""

    def get(self, path: str, default: object = None) -> Handler:  # noqa: ARG002
        return self[""]


def checks_of(cluster: Cluster, names: Sequence[str], node: str) -> dict[str, Check | None]:
    """Return, for each Service named, what its server is to say; None where it has none."""
    found: dict[str, Check | None] = {}
    for name in names:
        facts = cluster.services.get(name)
        if facts is None or not facts.health_check_node_port:
            found[name] = None
            continue
        slices = list(cluster.slices(name))
        ports = {(port.key.port_name, port.key.protocol) for ports in facts.ports.values() for port in ports}
        parts = [found_for(slices, port_name, protocol) for port_name, protocol in ports]
        found[name] = Check(facts.health_check_node_port, ready_local_count(parts, node))
    return found


def reply_for(name: str, check: Check, is_proxy_healthy: bool) -> Reply:
    """Return the answer for one Service, as kube-proxy words it."""
    namespace, _, service = name.partition("/")
    body = {
        "service": {"namespace": namespace, "name": service},
        "localEndpoints": check.local_endpoints,
        "serviceProxyHealthy": is_proxy_healthy,
    }
    status = 200 if check.local_endpoints and is_proxy_healthy else 503
    headers = (("X-Content-Type-Options", "nosniff"), (WEIGHT_HEADER, str(check.local_endpoints)))
    return Reply(status, "application/json", json.dumps(body).encode() + b"\n", headers)


class ServiceHealth:
    """The servers, kept as the Services want them."""

    def __init__(self, node: str, is_proxy_healthy: Callable[[], bool], events: Events) -> None:
        self._node = node
        self._is_proxy_healthy = is_proxy_healthy
        self._events = events
        self._checks: dict[str, Check] = {}
        self._servers: dict[str, tuple[Server, ...]] = {}
        self._binds: tuple[str, ...] = ()
        self._failed: dict[str, int] = {}

    def follow(self, cluster: Cluster, changes: Sequence[PlanChange], services: Collection[str]) -> None:
        """Open, change and close servers as the Services that changed want it."""
        plans = [change.new for change in changes]
        binds = binds_for([plan.settings for plan in plans], [plan.family for plan in plans], cluster)
        names = {*services, *self._failed}
        if binds != self._binds:
            self._binds = binds
            names |= self._servers.keys()
            for name in list(self._servers):
                self._close(name)
        for name, check in checks_of(cluster, sorted(names), self._node).items():
            before = self._checks.pop(name, None)
            if check is None or before is None or before.port != check.port:
                self._close(name)
            if check is None:
                self._failed.pop(name, None)
                continue
            self._checks[name] = check
            if name not in self._servers:
                self._open(name, check, cluster.told_of(name))

    def tick(self, now: float) -> None:
        """Nothing is due by time."""

    def close(self) -> None:
        """Close all servers."""
        for name in list(self._servers):
            self._close(name)

    def _close(self, name: str) -> None:
        for server in self._servers.pop(name, ()):
            server.close()

    def _open(self, name: str, check: Check, about: Service) -> None:
        routes = _AnyPath({"": lambda: reply_for(name, self._checks[name], self._is_proxy_healthy())})
        opened: list[Server] = []
        for host in self._binds:
            try:
                server = serve(f"{host}:{check.port}", routes)
            except BindError as error:
                if self._failed.get(name) != check.port:
                    log.error("health check node port cannot be served", extra=logs.fields(service=name, reason=error))
                    self._events.emit("FailedToStartServiceHealthcheck", str(error), about)
                self._failed[name] = check.port
                continue
            if server:
                opened.append(server)
        if len(opened) == len(self._binds):
            self._failed.pop(name, None)
        if opened:
            self._servers[name] = tuple(opened)


def binds_for(settings: Sequence[NodeSettings], families: Sequence[Family], cluster: Cluster) -> tuple[str, ...]:
    """Return the hosts to listen on: every address, or the node's own ones that serve node ports."""
    if not any(each.node_port_addresses for each in settings):
        return ("[::]",) if Family.V6 in families else ("0.0.0.0",)
    node = cluster.node
    own = [entry.address for entry in (node.status.addresses if node and node.status else None) or ()]
    hosts: dict[str, None] = {}
    for each, family in zip(settings, families, strict=True):
        for address in own:
            is_v6 = ":" in address
            if canonical_address(address) is None or is_v6 != (family is Family.V6):
                continue
            if not each.node_port_addresses or inside(address, each.node_port_addresses):
                hosts[f"[{address}]" if is_v6 else address] = None
    return tuple(hosts)
