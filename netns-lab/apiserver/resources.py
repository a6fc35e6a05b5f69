"""The resources that are served, as a table: discovery, routing, columns and patches are read off it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True)
class Resource:
    """One resource. `zero`: what a bookmark of it carries beside metadata; `fields`: further field selectors."""

    group: str
    version: str
    plural: str
    singular: str
    kind: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    status: bool = False
    scale: bool = False
    generation: bool = False
    zero: tuple[tuple[str, Any], ...] = ()
    fields: tuple[str, ...] = ()

    @property
    def verbs(self) -> tuple[str, ...]:
        """What can be done to it: namespaces go one at a time."""
        return tuple(verb for verb in ALL_VERBS if self.kind != "Namespace" or verb != "deletecollection")

    @property
    def api_version(self) -> str:
        """As objects carry it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def base(self) -> str:
        """The path of its group and version."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    @property
    def list_kind(self) -> str:
        """The kind of its list."""
        return f"{self.kind}List"


_NODE_ZERO: tuple[tuple[str, Any], ...] = (
    ("spec", {}),
    (
        "status",
        {
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
            "nodeInfo": dict.fromkeys(
                (
                    "machineID",
                    "systemUUID",
                    "bootID",
                    "kernelVersion",
                    "osImage",
                    "containerRuntimeVersion",
                    "kubeletVersion",
                    "kubeProxyVersion",
                    "operatingSystem",
                    "architecture",
                ),
                "",
            ),
        },
    ),
)
_APPS: dict[str, Any] = {"status": True, "scale": True, "generation": True, "categories": ("all",)}
_RBAC = "rbac.authorization.k8s.io"

RESOURCES: tuple[Resource, ...] = (
    Resource("", "v1", "configmaps", "configmap", "ConfigMap", short=("cm",)),
    Resource("", "v1", "endpoints", "endpoints", "Endpoints", short=("ep",), zero=(("subsets", None),)),
    Resource(
        "",
        "v1",
        "events",
        "event",
        "Event",
        short=("ev",),
        fields=(
            "involvedObject.kind",
            "involvedObject.name",
            "involvedObject.namespace",
            "involvedObject.uid",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ),
    ),
    Resource("", "v1", "namespaces", "namespace", "Namespace", namespaced=False, short=("ns",), status=True),
    Resource(
        "",
        "v1",
        "nodes",
        "node",
        "Node",
        namespaced=False,
        short=("no",),
        status=True,
        zero=_NODE_ZERO,
        fields=("spec.unschedulable",),
    ),
    Resource(
        "",
        "v1",
        "pods",
        "pod",
        "Pod",
        short=("po",),
        categories=("all",),
        status=True,
        zero=(("spec", {"containers": None}), ("status", {})),
        fields=("spec.nodeName", "spec.restartPolicy", "spec.serviceAccountName", "status.phase", "status.podIP"),
    ),
    Resource("", "v1", "secrets", "secret", "Secret", fields=("type",)),
    Resource("", "v1", "serviceaccounts", "serviceaccount", "ServiceAccount", short=("sa",)),
    Resource(
        "",
        "v1",
        "services",
        "service",
        "Service",
        short=("svc",),
        categories=("all",),
        status=True,
        zero=(("spec", {}), ("status", {"loadBalancer": {}})),
        fields=("spec.clusterIP", "spec.type"),
    ),
    Resource("apps", "v1", "daemonsets", "daemonset", "DaemonSet", short=("ds",), **{**_APPS, "scale": False}),
    Resource("apps", "v1", "deployments", "deployment", "Deployment", short=("deploy",), **_APPS),
    Resource("apps", "v1", "replicasets", "replicaset", "ReplicaSet", short=("rs",), **_APPS),
    Resource("apps", "v1", "statefulsets", "statefulset", "StatefulSet", short=("sts",), **_APPS),
    Resource(
        "discovery.k8s.io",
        "v1",
        "endpointslices",
        "endpointslice",
        "EndpointSlice",
        generation=True,
        zero=(("addressType", ""), ("endpoints", None), ("ports", None)),
    ),
    Resource(
        "networking.k8s.io",
        "v1",
        "servicecidrs",
        "servicecidr",
        "ServiceCIDR",
        namespaced=False,
        status=True,
        zero=(("spec", {}), ("status", {})),
    ),
    Resource(_RBAC, "v1", "clusterrolebindings", "clusterrolebinding", "ClusterRoleBinding", namespaced=False),
    Resource(_RBAC, "v1", "clusterroles", "clusterrole", "ClusterRole", namespaced=False),
    Resource(_RBAC, "v1", "rolebindings", "rolebinding", "RoleBinding"),
    Resource(_RBAC, "v1", "roles", "role", "Role"),
)
BY_PATH = {(resource.base, resource.plural): resource for resource in RESOURCES}
BY_KIND = {(resource.api_version, resource.kind): resource for resource in RESOURCES}
NAMED = {resource.plural: resource for resource in RESOURCES}


def groups() -> list[tuple[str, str]]:
    """Return every group and version that is served, the core group first."""
    return list(dict.fromkeys((resource.group, resource.version) for resource in RESOURCES))
