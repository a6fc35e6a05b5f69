"""`lab status`: nodes, pods, Services and who serves what, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from . import controller, daemons, nodes, workloads
from .cluster import Lab
from .progress import out
from .state import LabError, key_of


def collect(lab: Lab) -> dict[str, Any]:
    """Return what there is."""
    pods = lab.pods()
    objects = lab.objects("Service", "EndpointSlice")
    services = [each for each in objects.values() if each["kind"] == "Service"]
    slices = [each for each in objects.values() if each["kind"] == "EndpointSlice"]
    owners = {address: pod.key for pod in pods for address in pod.addresses.values()}
    return {
        "lab": lab.spec.name,
        "mode": lab.spec.mode,
        "topology": lab.spec.topology,
        "client": {"addresses": list(lab.client_addresses().values()), "netns": lab.folder.netns("client")},
        "nodes": [
            {
                "name": node.name,
                "netns": node.netns,
                "addresses": list(node.addresses.values()),
                "podCIDRs": list(node.pod_cidrs),
                "subnet": node.subnet,
                **{program: _health(lab, node.name, program) for program in daemons.PROGRAMS},
                "pods": sum(pod.node == node.name for pod in pods),
            }
            for node in lab.spec.nodes
        ],
        "pods": [
            {
                "name": pod.key,
                "node": pod.node,
                "netns": pod.netns,
                "addresses": list(pod.addresses.values()),
                "labels": pod.labels,
                "ready": pod.ready and not pod.terminating,
                "terminating": pod.terminating,
                "serves": [f"{port.protocol}:{port.port}" for port in pod.ports],
            }
            for pod in pods
        ],
        "services": [_service(service, slices, owners) for service in services],
    }


def _health(lab: Lab, name: str, program: str) -> str:
    node = lab.node(name)
    if not daemons.pid_of(lab.folder, node, program):
        return "ended"
    if not nodes.agent_lives(lab, name):
        return "running"
    try:
        good, says = daemons.ready(lab.folder, node, program)
    except LabError as error:
        return str(error)
    return "ready" if good else says.splitlines()[0][:60] if says else "not ready"


def _service(service: Mapping[str, Any], slices: list[Any], owners: Mapping[str, str]) -> dict[str, Any]:
    _, namespace, name = controller.identity(service)
    spec = service["spec"]
    endpoints = []
    for each in slices:
        labels = each["metadata"].get("labels") or {}
        if labels.get(controller.SERVICE_NAME) != name or controller.identity(each)[1] != namespace:
            continue
        for endpoint in each.get("endpoints") or ():
            ports = ",".join(str(port.get("port")) for port in each.get("ports") or ())
            address = endpoint["addresses"][0]
            conditions = endpoint.get("conditions") or {}
            endpoints.append(
                {
                    "address": address,
                    "ports": ports,
                    "node": endpoint.get("nodeName", ""),
                    "pod": owners.get(address, ""),
                    "ready": conditions.get("ready", True) is not False,
                }
            )
    return {
        "name": key_of(namespace, name),
        "type": spec.get("type", "ClusterIP"),
        "clusterIPs": spec.get("clusterIPs") or [],
        "ports": workloads.describe_service(service).split(" ", 2)[-1] if spec.get("ports") else "",
        "externalIPs": _external(service),
        "endpoints": endpoints,
    }


def _external(service: Mapping[str, Any]) -> list[str]:
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    return [*(each["ip"] for each in ingress if each.get("ip")), *(service["spec"].get("externalIPs") or ())]


def show(found: Mapping[str, Any]) -> None:
    """Print the tables."""
    out.print(
        f"lab [bold]{found['lab']}[/]: mode {found['mode']}, topology {found['topology']}, "
        f"client {', '.join(found['client']['addresses'])}"
    )
    table = _table("nodes", "node", "address", "pod CIDR", "subnet", "pods", "pynetd", "pyproxy", "namespace")
    for node in found["nodes"]:
        table.add_row(
            node["name"], _lines(node["addresses"]), _lines(node["podCIDRs"]), node["subnet"], str(node["pods"]),
            _state(node["pynetd"]), _state(node["pyproxy"]), node["netns"],
        )  # fmt: skip
    out.print(table)
    table = _table("pods", "pod", "node", "address", "labels", "serves", "ready")
    for pod in found["pods"]:
        labels = " ".join(f"{key}={value}" for key, value in pod["labels"].items())
        ready = "[green]yes[/]" if pod["ready"] else "[yellow]terminating[/]" if pod["terminating"] else "[red]no[/]"
        table.add_row(pod["name"], pod["node"], _lines(pod["addresses"]), labels, " ".join(pod["serves"]), ready)
    out.print(table)
    table = _table("services", "service", "type", "cluster IP", "ports", "served by")
    for service in found["services"]:
        served = [
            f"{each['pod'] or each['address']}:{each['ports']}@{each['node'] or '?'}"
            + ("" if each["ready"] else " (not ready)")
            for each in service["endpoints"]
            if ":" not in each["address"] or len(service["clusterIPs"]) < 2
        ]
        addresses = [*service["clusterIPs"], *(f"{address} (external)" for address in service["externalIPs"])]
        table.add_row(
            service["name"], service["type"], _lines(addresses), service["ports"].replace(", ", "\n"),
            "\n".join(served) or "[red]nobody: refused[/]",
        )  # fmt: skip
    out.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=False, box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _lines(values: list[str]) -> str:
    return "\n".join(values)


def _state(text: str) -> str:
    return f"[green]{text}[/]" if text == "ready" else f"[red]{text}[/]"
