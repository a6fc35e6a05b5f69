"""The lab's API server (`lab up --api`): what kubectl writes becomes the lab's, what the lab's commands do is shown.

A process of the lab, started as `python -m netnslab.bridge LAB`. The lab's folder stays the truth of its pods; each
object and pod is compared on three sides (lab, API, what both last agreed on), and the side that changed wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from apiserver import Server, Store
from apiserver.errors import ApiError
from apiserver.resources import BY_KIND, NAMED, Resource
from pynet.kernel import netns
from pynet.kernel.inotify import Watch

from . import controller, machine, pods, state, workloads
from . import topology as plan
from .api import KUBECONFIG, kubeconfig
from .cluster import API_KINDS, Lab
from .state import Folder, LabError, PodRecord, write

Json = dict[str, Any]
Identity = tuple[str, str, str]
NODES_PORT = 6443  # where the nodes reach the API: on the router's address of their subnet
_SERVERS_OWN = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields")
_MIRRORED = {kind: resource for (_, kind), resource in BY_KIND.items() if kind in API_KINDS}


def listening(name: str, port: int) -> socket.socket:
    """Return a socket that listens in one of the lab's namespaces."""
    handle = netns.open_path(str(machine.NETNS / name))
    try:
        with netns.inside(handle):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    finally:
        os.close(handle)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("0.0.0.0", port))
    sock.listen(128)
    return sock


class Bridge:
    """Keeps one lab and its API server the same."""

    def __init__(self, folder: Folder, server: Server) -> None:
        self.folder = folder
        self.server = server
        self._agreed: dict[Identity, Json] = {}
        self._pods: dict[str, PodRecord] = {}
        self._replicas: dict[str, int] = {}
        self._refused: dict[Identity, Json] = {}
        self._failed: set[str] = set()

    def lab(self) -> Lab:
        """Return the lab as it is now, also while it comes up."""
        spec = self.folder.read_spec()
        if spec is None:
            raise LabError(f"lab {self.folder.name} is gone")
        return Lab(self.folder, spec)

    def step(self) -> None:
        """Bring both sides together."""
        lab = self.lab()
        with contextlib.suppress(_Busy):
            self._objects(lab)
            self._deployments(lab)
        self._all_pods(lab)

    def _objects(self, lab: Lab) -> None:
        ours = {identity: neutral(obj) for identity, obj in lab.objects(*API_KINDS).items()}
        theirs = {
            controller.identity(obj): neutral(obj)
            for resource in _MIRRORED.values()
            for obj in self.server.store.all(resource)
        }
        changed = False
        for identity in sorted(ours.keys() | theirs.keys() | self._agreed.keys()):
            mine, other, agreed = ours.get(identity), theirs.get(identity), self._agreed.get(identity)
            refused = other is not None and other == self._refused.get(identity)
            if mine != other and mine == agreed and not refused:
                changed = True
                self._to_lab(lab, identity, other)
            elif mine != other:
                self._to_api(identity, mine)  # of what the lab refuses, the API keeps its last form
            self._agree(identity, other if mine == agreed else mine)
        if changed:
            with held(self.folder):
                lab.sync()

    def _agree(self, identity: Identity, obj: Json | None) -> None:
        if obj is None:
            self._agreed.pop(identity, None)
            self._refused.pop(identity, None)
        else:
            self._agreed[identity] = obj

    def _to_lab(self, lab: Lab, identity: Identity, obj: Json | None) -> None:
        with held(self.folder):
            try:
                if obj is None:
                    lab.drop(identity)
                elif identity[0] == "Service":
                    lab.put_service(without_empty_status(obj))
                else:
                    lab.put(obj)
            except LabError as error:
                if obj is not None:
                    self._refused[identity] = obj
                print(f"{' '.join(identity)}: {error}", file=sys.stderr, flush=True)

    def _to_api(self, identity: Identity, obj: Json | None) -> None:
        kind, namespace, name = identity
        if obj is not None:
            self.server.put(obj)
            return
        with contextlib.suppress(ApiError):
            self.server.api.delete(_MIRRORED[kind], namespace, name, {"gracePeriodSeconds": 0})

    def _deployments(self, lab: Lab) -> None:
        resource = NAMED["deployments"]
        ours = {record.key: record for record in self.folder.read_deployments()}
        theirs = {controller.identity(obj)[1:]: obj for obj in self.server.store.all(resource)}
        shown = {_key(*identity): obj for identity, obj in theirs.items()}
        for key in sorted(ours.keys() | shown.keys()):
            record, obj, agreed = ours.get(key), shown.get(key), self._replicas.get(key)
            if record is None and obj is not None:
                if agreed is not None:
                    self._delete(resource, obj)
                    self._replicas.pop(key)
                    continue
                with held(self.folder):
                    workloads.apply(lab, [obj])
            elif obj is None and record is not None:
                if agreed is not None:
                    with held(self.folder):
                        workloads.delete(lab, [deployment_manifest(record)])
                    self._replicas.pop(key)
                    continue
                self.server.put(deployment_manifest(record))
            elif record is not None and obj is not None and obj["spec"].get("replicas", 1) != record.replicas:
                if record.replicas == agreed:
                    with held(self.folder):
                        workloads.apply(lab, [obj])
                else:
                    scaled = {**obj, "spec": {**obj["spec"], "replicas": record.replicas}}
                    self.server.put(scaled)
            self._replicas = {each.key: each.replicas for each in self.folder.read_deployments()}
        for record in self.folder.read_deployments():
            if missing := workloads.surplus(lab, record)[0]:
                with held(self.folder):
                    pods.create_all(lab, missing)
        self._show_replicas(resource)

    def _show_replicas(self, resource: Resource) -> None:
        there = self.folder.read_pods()
        for obj in self.server.store.all(resource):
            key = _key(*controller.identity(obj)[1:])
            mine = [pod for pod in there if pod.owner == key]
            ready = sum(pod.ready and not pod.terminating for pod in mine)
            status = {"replicas": len(mine), "updatedReplicas": len(mine), "readyReplicas": ready}
            status["availableReplicas"] = ready
            if obj.get("status") != status:
                with contextlib.suppress(ApiError):
                    self.server.store.update(resource, {**obj, "status": status}, status=True)

    def _all_pods(self, lab: Lab) -> None:
        resource = NAMED["pods"]
        ours = {pod.key: pod for pod in self.folder.read_pods()}
        shown = {_key(*controller.identity(obj)[1:]): obj for obj in self.server.store.all(resource)}
        for key in sorted(ours.keys() | shown.keys()):
            pod, obj = ours.get(key), shown.get(key)
            doomed = obj is None or bool(obj["metadata"].get("deletionTimestamp"))
            if pod is None and obj is not None:
                if key in self._pods or doomed:
                    self._delete(resource, obj)
                elif key not in self._failed:
                    self._make(lab, key, obj)
            elif pod is not None and key in self._pods and doomed and not pod.terminating:
                with contextlib.suppress(_Busy), held(self.folder):
                    pods.remove_all(lab, [pod])
                    self._pods.pop(key)  # a Deployment may make one of the same name at once: that is another pod
                    if obj is not None:
                        self._delete(resource, obj)
            elif pod is not None and (pod != self._pods.get(key) or obj is None):
                self.server.put(merged(obj, pod_manifest(pod, lab)))
                self._pods[key] = pod
        self._pods = {key: pod for key, pod in self._pods.items() if key in ours}

    def _make(self, lab: Lab, key: str, obj: Json) -> None:
        """Make the pod that somebody asked the API for."""
        try:
            with held(self.folder):
                pods.create_all(lab, [workloads.pod_of(lab, obj)])
        except _Busy:
            return
        except LabError as error:
            self._failed.add(key)
            print(f"pod {key}: {error}", file=sys.stderr, flush=True)
            failed = {"phase": "Failed", "reason": "LabError", "message": str(error)}
            self.server.put({**obj, "status": {**(obj.get("status") or {}), **failed}})

    def _delete(self, resource: Resource, obj: Json) -> None:
        meta = obj["metadata"]
        with contextlib.suppress(ApiError):
            options = {"gracePeriodSeconds": 0, "propagationPolicy": "Orphan"}
            self.server.api.delete(resource, meta.get("namespace", ""), meta["name"], options)


class _Busy(Exception):
    """Another command changes the lab; what waits for it is tried again."""


@contextlib.contextmanager
def held(folder: Folder) -> Any:
    """Hold the lab's lock for a change. Raise `_Busy` while a command holds it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(state.locked(folder.path / ".lock", wait=False))
        except BlockingIOError as error:
            raise _Busy from error
        yield


def _key(namespace: str, name: str) -> str:
    return name if namespace == "default" else f"{namespace}.{name}"


def neutral(obj: Mapping[str, Any]) -> Json:
    """Return an object without what an API server adds: what the lab and the API compare by."""
    meta = {key: value for key, value in obj["metadata"].items() if key not in _SERVERS_OWN}
    return {**obj, "metadata": meta}


def without_empty_status(service: Json) -> Json:
    """Return a Service without a status that says nothing, so that the lab gives it load-balancer addresses."""
    if ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress"):
        return service
    return {key: value for key, value in service.items() if key != "status"}


def merged(shown: Json | None, fresh: Json) -> Json:
    """Return a pod as the API shows it: what its author wrote, with the node and the status of what runs."""
    if shown is None:
        return fresh
    meta = {**shown["metadata"], "labels": fresh["metadata"]["labels"]}
    return {**shown, "metadata": meta, "spec": {**shown["spec"], **fresh["spec"]}, "status": fresh["status"]}


def pod_manifest(pod: PodRecord, lab: Lab) -> Json:
    """Return the Pod object of a pod that runs."""
    addresses = list(pod.addresses.values())
    ready = "True" if pod.ready and not pod.terminating else "False"
    ports = [
        {"containerPort": port.port, "protocol": port.protocol.upper()}
        | ({"name": port.name} if port.name else {})
        | ({"hostPort": port.host_port} if port.host_port else {})
        for port in pod.ports
    ]
    hosts = next((node.addresses for node in lab.spec.nodes if node.name == pod.node), {})
    container: Json = {"name": "main", "image": "lab/echo", "ports": ports}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod.name, "namespace": pod.namespace, "labels": pod.labels},
        "spec": {"nodeName": pod.node, "containers": [container], "terminationGracePeriodSeconds": 30},
        "status": {
            "phase": "Running",
            "podIP": addresses[0] if addresses else "",
            "podIPs": [{"ip": address} for address in addresses],
            "hostIP": next(iter(hosts.values()), ""),
            "conditions": [{"type": kind, "status": ready} for kind in ("Ready", "ContainersReady")],
            "containerStatuses": [{"name": "main", "ready": ready == "True", "restartCount": 0, "image": "lab/echo"}],
        },
    }


def deployment_manifest(record: Any) -> Json:
    """Return the Deployment object of a Deployment that the lab has."""
    ports = [
        {"containerPort": port.port, "protocol": port.protocol.upper()} | ({"name": port.name} if port.name else {})
        for port in record.ports
    ]
    pod: Json = {"containers": [{"name": "main", "image": "lab/echo", "ports": ports}]}
    if record.node:
        pod["nodeName"] = record.node
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": record.name, "namespace": record.namespace},
        "spec": {
            "replicas": record.replicas,
            "selector": {"matchLabels": record.labels},
            "template": {"metadata": {"labels": record.labels}, "spec": pod},
        },
    }


def write_kubeconfigs(lab: Lab, server: Server) -> None:
    """Write where the API is found: for the nodes, and at last for this machine, which says that it is ready."""
    for subnet in lab.topology.subnets:
        gateway = plan.gateways(lab.topology, subnet, False)["IPv4"]
        text = server.kubeconfig(cluster={"server": f"http://{gateway}:{NODES_PORT}"})
        write(lab.folder.path / f"{KUBECONFIG}-{subnet}", text.encode())
    write(kubeconfig(lab.folder), server.kubeconfig().encode())


def main(name: str) -> None:
    """Serve until ended."""
    stop_wanted = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop_wanted.set())
    folder = Folder(name)
    spec = folder.read_spec()
    if spec is None:
        raise SystemExit(f"no lab {name}")
    lab = Lab(folder, spec)
    remembered = folder.path / "api.json"
    port = json.loads(remembered.read_text())["port"] if remembered.exists() else 0
    inner = listening(folder.netns("underlay"), NODES_PORT)
    ranges = tuple(lab.topology.ranges["services"][family] for family in lab.families)
    # Versions begin with the time, so that they grow over restarts, and a watch from before one is told 410.
    store = Store(int(time.time() * 10))
    with Server(store, port=port, service_ranges=ranges, sockets=[inner]) as server:
        write(remembered, json.dumps({"port": server.port}).encode())
        bridge = Bridge(folder, server)
        bridge.step()
        server.store.compact()
        write_kubeconfigs(lab, server)
        watches = [Watch(path) for path in (folder.manifests, folder.pods, folder.deployments)]
        follow(bridge, watches, stop_wanted)


def follow(bridge: Bridge, watches: list[Watch], stop_wanted: threading.Event) -> None:
    """Step whenever either side changed; what failed or had to wait is tried again."""
    version, again = 0, time.monotonic()
    while not stop_wanted.is_set():
        names = [watch.wait(0.02) for watch in watches]
        if any(names) or None in names or bridge.server.store.version != version or time.monotonic() > again:
            version = bridge.server.store.version
            again = time.monotonic() + 1.0
            try:
                bridge.step()
            except (LabError, OSError, ApiError, ValueError) as error:
                print(f"not the same yet: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
