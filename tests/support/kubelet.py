"""A kubelet in small: runs what a DaemonSet's template says as containers of a containerd, the way a kubelet does.

Known are host paths, ConfigMaps, the service account's volume, memory, environments, init containers, security
contexts and probes; whatever else a template names fails the test.
"""

from __future__ import annotations

import base64
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.containerd import Containerd
from support.cri import EXITED, RUNNING, Container, Cri, Mount
from support.waiting import until

Json = dict[str, Any]
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_POD = {
    "serviceAccountName", "hostNetwork", "dnsPolicy", "priorityClassName", "terminationGracePeriodSeconds",
    "nodeSelector", "tolerations", "initContainers", "containers", "volumes",
}  # fmt: skip
_CONTAINER = {
    "name", "image", "command", "args", "envFrom", "env", "securityContext", "startupProbe", "livenessProbe",
    "readinessProbe", "resources", "volumeMounts",
}  # fmt: skip
_SECURITY = {"privileged", "readOnlyRootFilesystem", "allowPrivilegeEscalation", "capabilities"}


class Failed(AssertionError):
    """A container ended, or never got ready; with its log."""


@dataclass
class Pod:
    """A pod that runs. `took`: seconds from its sandbox to the end of each init container and to each probe's yes."""

    sandbox: str
    spec: Json
    folder: Path
    container: str = ""
    took: dict[str, float] = field(default_factory=dict)

    @property
    def log(self) -> str:
        """All that its containers wrote."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(line.split(" ", 3)[3] for path in paths for line in path.read_text().splitlines())


def write_volume(folder: Path, data: Mapping[str, str]) -> None:
    """Write a volume of files, or change it, as a kubelet does: a folder of that moment, and a link that is turned."""
    folder.mkdir(parents=True, exist_ok=True)
    stamped = folder / f"..{time.time_ns()}"
    stamped.mkdir()
    for name, text in data.items():
        (stamped / name).write_text(text)
    (folder / "..data_tmp").symlink_to(stamped.name)
    os.rename(folder / "..data_tmp", folder / "..data")
    for name in data:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


class Kubelet:
    """One node's. `ask` answers an HTTP GET from the node: address, port, path → status; `folder`: its own files."""

    def __init__(
        self,
        node: str,
        address: str,
        runtime: Containerd,
        folder: Path,
        api: tuple[str, int],
        authority: str,
        ask: Callable[[str, int, str], int],
    ) -> None:
        self.node, self.address, self.runtime, self.folder = node, address, runtime, folder
        self.cri = Cri(runtime.socket)
        self._api, self._authority, self._ask = api, authority, ask
        self._count = 0
        self.pods: list[Pod] = []

    def run(self, daemonset: Json, config_maps: Mapping[str, Json], token: str, *, wait: bool = True) -> Pod:
        """Start the pod of a DaemonSet; return when it is ready, or without `wait` when its containers are started."""
        spec = daemonset["spec"]["template"]["spec"]
        assert not spec.keys() - _POD, spec.keys() - _POD
        self._count += 1
        folder = self.folder / f"{daemonset['metadata']['name']}-{self._count}"
        folder.mkdir(parents=True)
        began = time.monotonic()
        sandbox = self.cri.run(folder.name, hosts_network=spec["hostNetwork"], privileged=True, logs=str(folder))
        pod = Pod(sandbox, spec, folder)
        self.pods.append(pod)
        volumes = {each["name"]: self._volume(each, folder, config_maps) for each in spec["volumes"]}
        write_volume(folder / "account", {"token": token, "ca.crt": self._authority, "namespace": "kube-system"})
        for init in spec.get("initContainers", ()):
            container = self.cri.start(sandbox, self._container(init, volumes, folder, config_maps))
            state = self._ended(container)
            pod.took[init["name"]] = time.monotonic() - began
            if state[1]:
                self._remove(pod)
                raise Failed(f"init container {init['name']}: exit {state[1]}\n{pod.log}")
        (main,) = spec["containers"]
        pod.container = self.cri.start(sandbox, self._container(main, volumes, folder, config_maps))
        pod.took["started"] = time.monotonic() - began
        if wait:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                self.wait(pod, probe)
                pod.took[probe] = time.monotonic() - began
        return pod

    def _ended(self, container: str) -> tuple[int, int]:
        """Wait for a container's end, and return its state."""
        until("the container ends", lambda: self.cri.state(container)[0] == EXITED, 120)
        return self.cri.state(container)

    def wait(self, pod: Pod, probe: str = "readinessProbe", seconds: float = 60) -> None:
        """Return when a probe of a pod says yes."""
        deadline = time.monotonic() + seconds
        while self.probe(pod, probe) != 200:
            if self.cri.state(pod.container)[0] != RUNNING or time.monotonic() > deadline:
                raise Failed(f"{pod.folder.name}: no yes from its {probe}\n{pod.log}")
            time.sleep(0.02)

    def probe(self, pod: Pod, probe: str = "readinessProbe") -> int:
        """Return what a probe gets, once: the HTTP status, or 0."""
        asked = pod.spec["containers"][0][probe]["httpGet"]
        return self._ask(asked.get("host", self.address), asked["port"], asked["path"])

    def replace(self, pod: Pod, daemonset: Json, config_maps: Mapping[str, Json], token: str) -> Pod:
        """Update a pod as a rolling update without surge does: the old one ends, then the new one starts."""
        assert daemonset["spec"]["updateStrategy"]["rollingUpdate"].keys() == {"maxUnavailable"}
        self.end(pod)
        return self.run(daemonset, config_maps, token)

    def debug(self, image: str, *command: str) -> tuple[int, str]:
        """Run a command as `kubectl debug node/… --profile=sysadmin` does; return its exit code and what it wrote."""
        self._count += 1
        folder = self.folder / f"debug-{self._count}"
        folder.mkdir(parents=True)
        sandbox = self.cri.run(folder.name, hosts_network=True, privileged=True, logs=str(folder))
        wanted = Container("debug", image, command, mounts=[Mount("/host", "/")], privileged=True, log="debug.log")
        container = self.cri.start(sandbox, wanted)
        state = self._ended(container)
        pod = Pod(sandbox, {}, folder)
        self.cri.stop(sandbox)
        self.cri.remove(sandbox)
        return state[1], pod.log

    def end(self, pod: Pod) -> None:
        """End a pod, with the grace that it has, and remove it."""
        began = time.monotonic()
        self.cri.stop_container(pod.container, pod.spec["terminationGracePeriodSeconds"])
        pod.took["end"] = time.monotonic() - began
        self._remove(pod)

    def _remove(self, pod: Pod) -> None:
        self.cri.stop(pod.sandbox)
        self.cri.remove(pod.sandbox)
        for volume in pod.folder.iterdir():
            if os.path.ismount(f"/proc/{self.runtime.pid}/root{volume}"):
                self.runtime.run("umount", "-n", str(volume))
        self.pods.remove(pod)

    def pid(self, pod: Pod) -> int:
        """Return the process of a pod's container, as the host numbers it."""
        tasks = self.runtime.run("ctr", "-a", str(self.runtime.socket), "-n", "k8s.io", "tasks", "list").stdout
        (pid,) = [int(line.split()[1]) for line in tasks.splitlines() if line.startswith(pod.container)]
        return pid

    def close(self) -> None:
        """End whatever runs."""
        for sandbox in self.cri.sandboxes:
            self.cri.stop(sandbox)
            self.cri.remove(sandbox)
        self.cri.close()

    def _volume(self, volume: Json, folder: Path, config_maps: Mapping[str, Json]) -> Path:
        """Return where a volume is on the host, made as the kubelet makes it."""
        (kind,) = volume.keys() - {"name"}
        said = volume[kind]
        if kind == "hostPath":
            how = {"DirectoryOrCreate": "mkdir -p -m 755", "FileOrCreate": "touch -a", "": "true"}[said.get("type", "")]
            self.runtime.run("sh", "-c", f'[ -e "$0" ] || {how} "$0"', said["path"])
            return Path(said["path"])
        place = folder / volume["name"]
        if kind == "configMap":
            write_volume(place, config_maps[said["name"]]["data"])
        else:
            assert (kind, said.keys()) == ("emptyDir", {"medium", "sizeLimit"}), volume
            place.mkdir()
            self.runtime.run("mount", "-n", "-t", "tmpfs", "-o", f"size={said['sizeLimit'].rstrip('i')}", "tmpfs",
                             str(place))  # fmt: skip
        return place

    def _container(
        self, wanted: Json, volumes: Mapping[str, Path], folder: Path, config_maps: Mapping[str, Json]
    ) -> Container:
        security = wanted.get("securityContext", {})
        for found, known in ((wanted, _CONTAINER), (security, _SECURITY)):
            assert not found.keys() - known, found.keys() - known
        env = {"KUBERNETES_SERVICE_HOST": self._api[0], "KUBERNETES_SERVICE_PORT": str(self._api[1])}
        for each in wanted.get("envFrom", ()):
            env |= config_maps[each["configMapRef"]["name"]]["data"]
        for each in wanted.get("env", ()):
            assert each["valueFrom"] == {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}} or each[
                "valueFrom"
            ] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
            env[each["name"]] = self.node
        mounts = [
            Mount(
                each["mountPath"],
                str(volumes[each["name"]]),
                bool(each.get("readOnly")),
                each.get("mountPropagation", "None"),
            )
            for each in wanted["volumeMounts"]
        ]
        capabilities = security.get("capabilities", {})
        return Container(
            wanted["name"],
            wanted["image"],
            [_expanded(word, env) for word in wanted["command"]],
            [_expanded(word, env) for word in wanted.get("args", ())],
            env,
            [*mounts, Mount(ACCOUNT, str(folder / "account"), True)],
            bool(security.get("privileged")),
            bool(security.get("readOnlyRootFilesystem")),
            security.get("allowPrivilegeEscalation") is False,
            (capabilities.get("add", ()), capabilities.get("drop", ())),
            f"{wanted['name']}.log",
        )


def _expanded(word: str, env: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: env.get(match[1], match[0]), word)


def token_for(account: str) -> str:
    """Return a token that says whose it is, in a JSON web token's clothes."""
    body = base64.urlsafe_b64encode(f'{{"sub":"{account}"}}'.encode()).decode().rstrip("=")
    return f"e30.{body}.{os.urandom(8).hex()}"
