"""Clusters of any size for benchmarks: N Services of one port with M endpoints each, as the API's own objects."""

from __future__ import annotations

from collections.abc import Iterator

from pynet.objects import (
    EndpointSlice,
    Metadata,
    Object,
    Service,
    ServicePort,
    ServiceSpec,
    SliceEndpoint,
    SlicePort,
)


def cluster_ip(number: int) -> str:
    """Return the address of Service `number` (up to 2**20 of them), in 10.96.0.0/12."""
    value = (10 << 24) + (96 << 16) + number + 10
    return f"{value >> 24}.{value >> 16 & 255}.{value >> 8 & 255}.{value & 255}"


def pod_ip(number: int) -> str:
    """Return the address of pod `number`, in 10.128.0.0/9."""
    value = (10 << 24) + (128 << 16) + number % (2**23 - 2) + 1
    return f"{value >> 24}.{value >> 16 & 255}.{value >> 8 & 255}.{value & 255}"


def service(number: int) -> Service:
    return Service(
        Metadata(name=f"svc-{number}", namespace="bench"),
        ServiceSpec(
            cluster_ip=cluster_ip(number),
            cluster_ips=(cluster_ip(number),),
            ip_families=("IPv4",),
            ports=(ServicePort(port=80, name="http", target_port=8080),),
        ),
    )


def endpoint_slice(number: int, endpoints: int, shift: int = 0) -> EndpointSlice:
    """Return the slice of Service `number`; another `shift` replaces its last endpoint by another one."""
    first = number * endpoints
    numbers = [first + index for index in range(endpoints)]
    if shift:
        numbers[-1] = 4_000_000 + (number * 64 + shift) % 4_000_000
    return EndpointSlice(
        Metadata(name=f"svc-{number}-x", namespace="bench", labels={"kubernetes.io/service-name": f"svc-{number}"}),
        address_type="IPv4",
        endpoints=tuple(SliceEndpoint((pod_ip(pod),), node_name=f"node-{pod % 50}") for pod in numbers),
        ports=(SlicePort("http", 8080, "TCP"),),
    )


def objects(services: int, endpoints: int) -> Iterator[Object]:
    """Yield the whole cluster."""
    for number in range(services):
        yield service(number)
        yield endpoint_slice(number, endpoints)
