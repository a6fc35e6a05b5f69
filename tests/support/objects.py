"""Kubernetes objects for tests, made in a line."""

from __future__ import annotations

from typing import Any

from pynet.objects import (
    EndpointConditions,
    EndpointHints,
    EndpointSlice,
    ForZone,
    Metadata,
    Service,
    SliceEndpoint,
    SlicePort,
    decode,
)


def service(
    name: str = "web",
    ip: str = "10.96.0.10",
    *ports: dict[str, Any],
    created: str | None = None,
    annotations: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
    ingress: list[dict[str, str]] | None = None,
    **spec: Any,
) -> Service:
    """Return a Service in namespace `default`; `spec` in the API's spelling; port `http` 80 unless `ports` say else."""
    document = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "creationTimestamp": created,
            "annotations": annotations,
            "labels": labels,
        },
        "spec": {"clusterIP": ip, "ports": list(ports) or [{"name": "http", "port": 80}], **spec},
        "status": {"loadBalancer": {"ingress": ingress or []}},
    }
    made = decode(document, "test")
    assert isinstance(made, Service)
    return made


def endpoint(
    address: str,
    node: str | None = None,
    *,
    ready: bool | None = None,
    serving: bool | None = None,
    terminating: bool | None = None,
    zones: tuple[str, ...] | None = None,
    nodes: tuple[str, ...] | None = None,
) -> SliceEndpoint:
    """Return an endpoint of a slice."""
    hints = None
    if zones is not None or nodes is not None:
        hints = EndpointHints(tuple(map(ForZone, zones or ())), tuple(map(ForZone, nodes or ())))
    return SliceEndpoint((address,), EndpointConditions(ready, serving, terminating), node, None, hints)


def piece(
    service: str,
    *endpoints: SliceEndpoint | str,
    name: str = "",
    ports: tuple[tuple[str, str, int], ...] = (("http", "TCP", 8080),),
    kind: str = "IPv4",
    trigger: str | None = None,
) -> EndpointSlice:
    """Return an EndpointSlice of a Service in namespace `default`."""
    return EndpointSlice(
        Metadata(
            name=name or f"{service}-1",
            namespace="default",
            labels={"kubernetes.io/service-name": service},
            annotations={"endpoints.kubernetes.io/last-change-trigger-time": trigger} if trigger else None,
        ),
        kind,
        tuple(endpoint(each) if isinstance(each, str) else each for each in endpoints),
        tuple(SlicePort(name, number, protocol) for name, protocol, number in ports),
    )
