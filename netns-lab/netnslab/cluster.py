"""The lab as its commands see it, and its objects: the manifests that all daemons read, kept true to the pods.

`sync` is the cluster's controllers at work: it runs inside each command that changes pods, Services or nodes.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from . import controller, state
from . import topology as plan
from .controller import Manifest
from .state import Folder, LabError, NodeRecord, PodRecord, Spec

API_KINDS = ("Service", "EndpointSlice", "Endpoints", "Node", "ServiceCIDR")


class Lab:
    """One lab that is up: where its state is, what was asked for, its topology. Read once; `save` after a change."""

    def __init__(self, folder: Folder, spec: Spec) -> None:
        self.folder = folder
        self.spec = spec
        self.topology = plan.load(spec.topology)

    @classmethod
    def load(cls, name: str, *, whole: bool = True) -> Lab:
        """Return the lab of that name; raise `LabError` when it is not up, or (if `whole`) never came up wholly."""
        folder = Folder(name)
        spec = folder.read_spec()
        if spec is None:
            raise LabError(f"no lab {name!r} is up (lab up starts one)")
        if whole and not spec.complete:
            raise LabError(f"lab {name!r} never came up wholly: run lab up again, or lab down")
        return cls(folder, spec)

    def save(self, **changes: Any) -> None:
        """Change the spec and remember it."""
        self.spec = msgspec.structs.replace(self.spec, **changes)
        self.folder.write_spec(self.spec)

    @property
    def families(self) -> tuple[str, ...]:
        """The lab's address families."""
        return plan.families(self.spec.ipv6)

    def node(self, name: str) -> NodeRecord:
        """Return a node by name, or by index: `2` is the node that was made second."""
        for node in self.spec.nodes:
            if name in (node.name, str(node.index)):
                return node
        raise LabError(f"no node {name!r}; there are: {', '.join(node.name for node in self.spec.nodes)}")

    def pods(self) -> list[PodRecord]:
        """Return all pods."""
        return self.folder.read_pods()

    def pod(self, key: str) -> PodRecord:
        """Return a pod by its key."""
        pods = {pod.key: pod for pod in self.pods()}
        if key not in pods:
            raise LabError(f"no pod {key!r}; there are: {', '.join(pods) or 'none'}")
        return pods[key]

    def netns_of(self, name: str) -> str:
        """Return the namespace of a pod, a node, `client` or `underlay`."""
        if name in ("client", "underlay"):
            return self.folder.netns(name)
        for node in self.spec.nodes:
            if name in (node.name, str(node.index)):
                return node.netns
        for pod in self.pods():
            if name == pod.key:
                return pod.netns
        known = ["client", *(node.name for node in self.spec.nodes), *(pod.key for pod in self.pods())]
        raise LabError(f"nothing called {name!r} in the lab; there are: {', '.join(known)}")

    def client_addresses(self) -> dict[str, str]:
        """Return the client's addresses, by family."""
        return plan.client_addresses(self.topology, self.spec.ipv6)

    def objects(self, *kinds: str) -> dict[tuple[str, str, str], Manifest]:
        """Return the objects that the daemons read, of some kinds or all."""
        found: dict[tuple[str, str, str], Manifest] = {}
        for path in sorted(self.folder.manifests.glob("*.json")):
            manifest = json.loads(path.read_bytes())
            if not kinds or manifest["kind"] in kinds:
                found[controller.identity(manifest)] = manifest
        return found

    def put(self, manifest: Mapping[str, Any]) -> None:
        """Write one object."""
        state.write(self._path(controller.identity(manifest)), json.dumps(manifest, indent=1).encode())

    def drop(self, identity: tuple[str, str, str]) -> bool:
        """Remove one object; return whether it was there."""
        path = self._path(identity)
        there = path.exists()
        path.unlink(missing_ok=True)
        return there

    def _path(self, identity: tuple[str, str, str]) -> Path:
        return self.folder.manifests / (".".join(part.lower() for part in identity if part) + ".json")

    def put_service(self, service: Manifest) -> Manifest:
        """Write a Service as the API server would store it; return that."""
        services = self.objects("Service")
        identity = controller.identity(service)
        service = {**service, "metadata": {**service["metadata"], "namespace": identity[1]}}
        try:
            stored = controller.service_defaults(
                service,
                services.pop(identity, None),
                list(services.values()),
                self.topology.ranges,
                self.families,
            )
        except controller.BadManifest as error:
            raise LabError(str(error)) from None
        self.put(stored)
        return stored

    def put_node(self, node: NodeRecord) -> None:
        """Write a node's Node object."""
        self.put(controller.node_manifest(node.name, node.addresses, node.pod_cidrs, node.zone, {}))

    def sync(self) -> None:
        """Bring the EndpointSlices to what pods and Services say."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        zones = {node.name: node.zone for node in self.spec.nodes}
        pods = self.pods()
        objects = self.objects("Service", "EndpointSlice")
        ours = {
            identity
            for identity, each in objects.items()
            if each["kind"] == "EndpointSlice"
            and (each["metadata"].get("labels") or {}).get(controller.MANAGED_BY) == controller.CONTROLLER
        }
        for service in [each for each in objects.values() if each["kind"] == "Service"]:
            for wanted in controller.slices_of(service, pods, zones, now):
                identity = controller.identity(wanted)
                ours.discard(identity)
                if not controller.same_but_for_time(objects.get(identity), wanted):
                    self.put(wanted)
        for identity in ours:
            self.drop(identity)

    def service(self, key: str) -> Manifest:
        """Return a Service by its key."""
        services = {state.key_of(*identity[1:]): each for identity, each in self.objects("Service").items()}
        if key not in services:
            raise LabError(f"no Service {key!r}; there are: {', '.join(services) or 'none'}")
        return services[key]


def free_index(nodes: Iterable[NodeRecord]) -> int:
    """Return the lowest node index not in use."""
    used = {node.index for node in nodes}
    return next(index for index in range(1, plan.LIMIT + 1) if index not in used)


def node_record(folder: Folder, topology: plan.Topology, ipv6: bool, index: int, name: str = "") -> NodeRecord:
    """Return the node of an index."""
    name = name or f"node{index}"
    return NodeRecord(
        name=name,
        index=index,
        netns=folder.netns(name),
        subnet=plan.node_subnet(topology, index),
        addresses=plan.node_addresses(topology, index, ipv6),
        pod_cidrs=plan.pod_cidrs(topology, index, ipv6),
        zone=f"zone-{'abc'[(index - 1) % 3]}",
        port=f"port{index}",
    )
