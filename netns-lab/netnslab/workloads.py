"""`apply`, `delete` and `scale`: manifests as Kubernetes users write them, turned into pods and objects.

Service, EndpointSlice, Endpoints, Node and ServiceCIDR go to the daemons; a Pod or a Deployment becomes pods whose one
process serves every containerPort (the image is not looked at). Others are refused by name.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from . import controller, pods
from .cluster import API_KINDS, Lab
from .controller import Manifest
from .state import DeploymentRecord, LabError, PodPort, PodRecord

KINDS = (*API_KINDS, "Pod", "Deployment")
PASSED_OVER = ("Namespace",)


def read(path: str) -> list[Manifest]:
    """Return the objects of a manifest file; `-` is the standard input."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text()
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}") from None
    return parse(text, path)


def parse(text: str, origin: str) -> list[Manifest]:
    """Return the objects of a manifest text: documents, lists walked."""
    try:
        documents = list(yaml.load_all(text, Loader=yaml.CSafeLoader))
    except yaml.YAMLError as error:
        raise LabError(f"{origin}: {error}") from None
    return [each for document in documents for each in flatten(document, origin)]


def flatten(document: Any, origin: str) -> Iterator[Manifest]:
    """Yield the objects of one document."""
    if document is None:
        return
    if not isinstance(document, Mapping) or not isinstance(document.get("kind"), str):
        raise LabError(f"{origin}: expected objects with apiVersion and kind")
    if document["kind"].endswith("List"):
        for item in document.get("items") or ():
            yield from flatten({"kind": document["kind"].removesuffix("List"), **item}, origin)
        return
    if document["kind"] not in (*KINDS, *PASSED_OVER):
        raise LabError(f"{origin}: {document['kind']}: the lab knows {', '.join(KINDS)}")
    if not (document.get("metadata") or {}).get("name"):
        raise LabError(f"{origin}: {document['kind']}: metadata.name: missing")
    if document["kind"] not in PASSED_OVER:
        yield dict(document)


def ports_of(pod_spec: Mapping[str, Any]) -> tuple[PodPort, ...]:
    """Return the ports of a pod's containers."""
    return tuple(
        PodPort(
            str(port.get("protocol", "TCP")).lower(),
            port["containerPort"],
            port.get("name", ""),
            port.get("hostPort", 0),
        )
        for container in pod_spec.get("containers") or ()
        for port in container.get("ports") or ()
    )


def apply(lab: Lab, manifests: Sequence[Manifest]) -> list[str]:
    """Make the lab what the manifests say; return a line for each."""
    said = []
    wanted: list[PodRecord] = []
    for manifest in sorted(manifests, key=lambda each: each["kind"] not in API_KINDS):
        kind, namespace, name = controller.identity(manifest)
        if kind == "Service":
            stored = lab.put_service(manifest)
            said.append(f"Service {namespace}/{name}: {describe_service(stored)}")
        elif kind in API_KINDS:
            metadata = {**manifest["metadata"], **({"namespace": namespace} if namespace else {})}
            lab.put({**manifest, "metadata": metadata})
            said.append(f"{kind} {namespace}/{name}".replace(" /", " "))
        elif kind == "Pod":
            pod = pod_of(lab, manifest)
            if any(each.key == pod.key for each in lab.pods()):
                said.append(f"Pod {namespace}/{name}: is there already")
            else:
                wanted.append(pod)
        else:
            deployment = deployment_of(manifest)
            lab.folder.write_deployment(deployment)
            wanted += surplus(lab, deployment)[0]
            said.append(f"Deployment {namespace}/{name}: {deployment.replicas} replicas")
    made = pods.create_all(lab, wanted)
    said += [describe_pod(pod) for pod in made]
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            pods.remove_all(lab, surplus(lab, deployment_of(manifest))[1])
    return said


def describe_pod(pod: PodRecord) -> str:
    """Return a line on a pod."""
    return f"pod {pod.key} on {pod.node}: {', '.join(pod.addresses.values())}"


def describe_service(service: Mapping[str, Any]) -> str:
    """Return where a Service is found."""
    spec = service["spec"]
    ports = [
        f"{port.get('name') or port['port']}:{port['protocol'].lower()}/{port['port']}"
        + (f" (node port {port['nodePort']})" if port.get("nodePort") else "")
        for port in spec.get("ports") or ()
    ]
    return f"{spec['type']} {', '.join(spec.get('clusterIPs') or ['-'])} {', '.join(ports)}"


def pod_of(lab: Lab, manifest: Manifest) -> PodRecord:
    """Return the pod that a Pod manifest asks for."""
    metadata, spec = manifest["metadata"], manifest.get("spec") or {}
    node = spec.get("nodeName") or least_used(lab, lab.pods())
    return pods.record(
        lab,
        metadata["name"],
        node,
        namespace=metadata.get("namespace") or "default",
        labels=dict(metadata.get("labels") or {}),
        ports=ports_of(spec),
    )


def deployment_of(manifest: Manifest) -> DeploymentRecord:
    """Return what a Deployment manifest asks for."""
    spec = manifest.get("spec") or {}
    template = spec.get("template") or {}
    _, namespace, name = controller.identity(manifest)
    pod_spec = template.get("spec") or {}
    return DeploymentRecord(
        name,
        namespace,
        spec.get("replicas", 1),
        dict((template.get("metadata") or {}).get("labels") or {}),
        ports_of(pod_spec),
        pod_spec.get("nodeName", ""),
    )


def least_used(lab: Lab, others: Sequence[PodRecord]) -> str:
    """Return the node that has the fewest of `others`."""
    if not lab.spec.nodes:
        raise LabError("the lab has no node")
    counts = Counter(pod.node for pod in others)
    return min(lab.spec.nodes, key=lambda node: (counts[node.name], node.index)).name


def surplus(lab: Lab, deployment: DeploymentRecord) -> tuple[list[PodRecord], list[PodRecord]]:
    """Return the pods that a Deployment lacks, and those that it has too many."""
    there = [pod for pod in lab.pods() if pod.owner == deployment.key]
    there.sort(key=lambda pod: int(pod.name.rpartition("-")[2]))
    used = {pod.name for pod in there}
    names = (f"{deployment.name}-{number}" for number in range(1, 100000))
    missing: list[PodRecord] = []
    while len(there) + len(missing) < deployment.replicas:
        name = next(name for name in names if name not in used)
        node = deployment.node or least_used(lab, [*there, *missing])
        missing.append(
            pods.record(
                lab,
                name,
                node,
                namespace=deployment.namespace,
                labels=deployment.labels,
                ports=deployment.ports,
                owner=deployment.key,
            )
        )
    return missing, there[deployment.replicas :]


def scale(lab: Lab, key: str, replicas: int) -> list[str]:
    """Give a Deployment so many pods."""
    known = {deployment.key: deployment for deployment in lab.folder.read_deployments()}
    if key not in known:
        raise LabError(f"no Deployment {key!r}; there are: {', '.join(known) or 'none'}")
    if replicas < 0:
        raise LabError(f"scale {key} {replicas}: expected 0 or more")
    deployment = msgspec.structs.replace(known[key], replicas=replicas)
    lab.folder.write_deployment(deployment)
    missing, spare = surplus(lab, deployment)
    made = pods.create_all(lab, missing) if missing else []
    if spare:
        pods.remove_all(lab, spare)
    return [f"Deployment {key}: {replicas} replicas", *(describe_pod(pod) for pod in made)]


def delete(lab: Lab, manifests: Sequence[Manifest]) -> list[str]:
    """Take away what the manifests name; what is not there is fine."""
    said = []
    doomed: list[PodRecord] = []
    for manifest in manifests:
        kind, namespace, name = controller.identity(manifest)
        if kind in API_KINDS:
            there = lab.drop((kind, namespace, name))
        elif kind == "Pod":
            found = [pod for pod in lab.pods() if (pod.namespace, pod.name) == (namespace, name)]
            doomed += found
            there = bool(found)
        else:
            key = deployment_of(manifest).key
            doomed += [pod for pod in lab.pods() if pod.owner == key]
            there = any(each.key == key for each in lab.folder.read_deployments())
            lab.folder.forget_deployment(key)
        said.append(f"{kind} {namespace}/{name}: {'deleted' if there else 'was not there'}".replace(" /", " "))
    lab.sync()
    if doomed:
        pods.remove_all(lab, doomed)
    return said
