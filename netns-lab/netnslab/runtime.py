"""CNI as a container runtime does it (specification 1.1.0, sections 3 and 4): conflist, executables, cached result.

The runtime of a node is a process of that node, so executables run inside the node's namespace. ADD goes forward
through the list, each plugin given its predecessor's result; DEL and CHECK use the cached requests and result.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from . import machine
from .state import Attachment, Folder, LabError, NodeRecord, PodRecord

INTERFACE = "eth0"
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")  # that this runtime speaks
PLUGIN_FOLDERS = (Path(sys.executable).parent, Path("/usr/lib/cni"), Path("/opt/cni/bin"))


def load_conflist(folder: Path) -> dict[str, Any]:
    """Return the network of a configuration folder: the first file by name, as runtimes choose it."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix in (".conflist", ".conf", ".json"))
    except FileNotFoundError:
        found = []
    if not found:
        raise LabError(f"no CNI configuration in {folder}: pynetd has not written one")
    try:
        conf: dict[str, Any] = json.loads(found[0].read_text())
    except ValueError as error:
        raise LabError(f"{found[0]}: {error}") from None
    if "plugins" not in conf:
        conf = {"cniVersion": conf.get("cniVersion"), "name": conf["name"], "plugins": [conf]}
    return conf


def newest(conflist: Mapping[str, Any]) -> str:
    """Return the newest version of the specification that both the list and this runtime know."""
    named = {str(conflist.get("cniVersion", "0.1.0")), *map(str, conflist.get("cniVersions") or ())}
    known = [version for version in VERSIONS if version in named]
    if not known:
        raise LabError(
            f"CNI configuration {conflist.get('name')}: cniVersion: none of {', '.join(sorted(named))} is known"
        )
    return known[-1]


def requests_of(conflist: Mapping[str, Any], capabilities: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the request for each plugin of a list: name and version put in, and what its capabilities ask for."""
    found = []
    version = newest(conflist)
    for plugin in conflist["plugins"]:
        request = {key: value for key, value in plugin.items() if key != "capabilities"}
        request["name"] = conflist["name"]
        request["cniVersion"] = version
        wanted = plugin.get("capabilities") or {}
        config = {key: value for key, value in capabilities.items() if wanted.get(key)}
        if config:
            request["runtimeConfig"] = config
        found.append(request)
    return tuple(found)


def capabilities_of(pod: PodRecord) -> dict[str, Any]:
    """Return what a runtime would hand to plugins that can take it."""
    mappings = [
        {"hostPort": port.host_port, "containerPort": port.port, "protocol": port.protocol}
        for port in pod.ports
        if port.host_port
    ]
    return {"portMappings": mappings} if mappings else {}


def _call(folder: Folder, node: NodeRecord, pod: PodRecord, verb: str, request: dict[str, Any]) -> dict[str, Any]:
    kind = str(request.get("type", ""))
    executable = next((path / kind for path in PLUGIN_FOLDERS if os.access(path / kind, os.X_OK)), None)
    if executable is None:
        raise LabError(f"CNI plugin {kind!r} is in none of {', '.join(map(str, PLUGIN_FOLDERS))}")
    pod_args = {
        "K8S_POD_NAMESPACE": pod.namespace,
        "K8S_POD_NAME": pod.name,
        "K8S_POD_INFRA_CONTAINER_ID": pod.container_id,
        "K8S_POD_UID": pod.container_id,
    }
    environment = {
        "CNI_COMMAND": verb,
        "CNI_CONTAINERID": pod.container_id,
        "CNI_NETNS": str(machine.NETNS / pod.netns),
        "CNI_IFNAME": INTERFACE,
        "CNI_PATH": ":".join(map(str, PLUGIN_FOLDERS)),
        "CNI_ARGS": ";".join(["IgnoreUnknown=1", *(f"{key}={value}" for key, value in pod_args.items())]),
    }
    extra = {**environment, "XTABLES_LOCKFILE": str(folder.node(node.netns) / "xtables.lock")}
    done = machine.run(
        machine.inside(node.netns, str(executable)),
        input=json.dumps(request),
        check=False,
        env=machine.marked(folder.name, extra),
    )
    line = " ".join([*(f"{key}={value}" for key, value in environment.items()), str(executable)])
    if done.returncode:
        raise LabError(
            f"CNI {verb} of pod {pod.key} on {node.name} failed",
            command=f"{line} <<< '{json.dumps(request)}'",
            output=(done.stdout + done.stderr).strip(),
        )
    try:
        return dict(json.loads(done.stdout)) if done.stdout.strip() else {}
    except ValueError:
        raise LabError(f"CNI {verb} of pod {pod.key}: not JSON", command=line, output=done.stdout) from None


def add(folder: Folder, node: NodeRecord, pod: PodRecord) -> Attachment:
    """Wire a pod; when a plugin fails, take back what was done, as runtimes do."""
    requests = requests_of(load_conflist(folder.node(node.netns) / "cni"), capabilities_of(pod))
    result: dict[str, Any] = {}
    try:
        for request in requests:
            previous = {"prevResult": result} if result else {}
            result = _call(folder, node, pod, "ADD", {**request, **previous})
    except LabError:
        undone = msgspec.structs.replace(pod, attachment=Attachment(requests, result))
        for request in reversed(requests):
            try:
                _delete(folder, node, undone, request)
            except LabError:
                continue
        raise
    return Attachment(requests, result)


def _delete(folder: Folder, node: NodeRecord, pod: PodRecord, request: dict[str, Any]) -> None:
    previous = {"prevResult": pod.attachment.result} if pod.attachment and pod.attachment.result else {}
    _call(folder, node, pod, "DEL", {**request, **previous})


def delete(folder: Folder, node: NodeRecord, pod: PodRecord) -> None:
    """Unwire a pod, from the cached requests and result."""
    for request in reversed(pod.attachment.requests if pod.attachment else ()):
        _delete(folder, node, pod, request)


def check(folder: Folder, node: NodeRecord, pod: PodRecord) -> None:
    """Raise `LabError` when a plugin finds a pod's wiring wrong."""
    for request in pod.attachment.requests if pod.attachment else ():
        _call(folder, node, pod, "CHECK", {**request, "prevResult": pod.attachment.result if pod.attachment else {}})
