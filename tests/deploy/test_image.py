"""deploy/ at work: the image that was built, run as the DaemonSets say, on two nodes that have a containerd each.

Only with an image: `make try-image` builds one and comes here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from apiserver.resources import NAMED
from netnslab import agents
from support.deployed import Deployed, Json, answering, publish, under_load
from support.kubelet import Failed, token_for, write_volume
from support.waiting import until

if not os.environ.get("PYNET_IMAGE"):
    pytest.skip("no PYNET_IMAGE: `make try-image` builds one", allow_module_level=True)
pytestmark = [pytest.mark.root, pytest.mark.slow]


def test_the_init_step_installs_executables_with_their_own_python(running: Deployed) -> None:
    for node in running.kubelets:
        folder = running.place / node / "bin"
        assert {"pynet-cni", "pynet-ipam", "pynet-runtime", "loopback"} <= set(os.listdir(folder))
        assert list((running.place / node / "conf").glob("*.conflist"))


def served(deployed: Deployed, node: str) -> int:
    """Return how many pods a node's agent has wired itself."""
    said = deployed.kubelets[node].runtime.run("curl", "-s", "127.0.0.1:10271/metrics").stdout
    return int(sum(float(found) for found in re.findall(r'pynetd_cni_requests_total{code="0",verb="ADD"} (\S+)', said)))


def test_the_agent_serves_the_executables_from_its_container(running: Deployed) -> None:
    assert (served(running, "node1"), served(running, "node2")) == (2, 1)


def test_services_answer_from_pods_nodes_and_outside(running: Deployed) -> None:
    both = {"web-1", "web-2"}
    for protocol in ("tcp", "udp"):
        until(protocol, lambda protocol=protocol: answering(running, "asker", "10.96.0.80", 80, protocol) == both)
        for origin in ("asker", "node1", "node2"):
            assert answering(running, origin, "10.96.0.80", 80, protocol) == both, (origin, protocol)
        assert answering(running, "client", running.kubelets["node1"].address, 30080, protocol) == both


def test_only_what_the_roles_allow_is_asked_for(running: Deployed) -> None:
    """The server enforces the roles: a request too many is refused, one too few is a right too many."""
    for program in ("pynetd", "pyproxy"):
        user = f"system:serviceaccount:kube-system:{program}"
        asked = {(each.plural, each.verb) for each in running.server.requests if each.user == user}
        rules = running.server.store.get(NAMED["clusterroles"], "", f"pynet:{program}")["rules"]
        allowed = {(plural, verb) for rule in rules for plural in rule["resources"] for verb in rule["verbs"]}
        assert asked <= allowed
        assert {each for each in allowed if each[1] == "watch"} <= asked
        for node in running.kubelets:
            assert "orbidden" not in running.pods[program, node].log


def test_pyproxy_keeps_three_capabilities(running: Deployed) -> None:
    pid = running.kubelets["node1"].pid(running.pods["pyproxy", "node1"])
    status = Path(f"/proc/{pid}/status").read_text()
    wanted = f"{1 << 10 | 1 << 12 | 1 << 13:016x}"
    assert {found[1] for found in re.finditer(r"Cap(?:Prm|Eff|Bnd):\s*(\w+)", status)} == {wanted}


def test_an_operator_asks_in_the_containers(running: Deployed) -> None:
    """kubectl exec ds/pynetd -- pynetd status, and pyproxy explain with the daemon's own flags."""
    kubelet = running.kubelets["node1"]
    code, said = kubelet.cri.execute(running.pods["pynetd", "node1"].container, "pynetd", "status")
    assert (code, "10.244.2.0/24" in said, "running" in said) == (0, True, True), said
    pod = running.pods["pyproxy", "node1"]
    (main,) = pod.spec["containers"]
    values = running.config_maps()[main["envFrom"][0]["configMapRef"]["name"]]["data"] | {"NODE_NAME": "node1"}
    flags = [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in main["args"]]
    words = ("pyproxy", "explain", running.addresses["asker"], "10.96.0.80:80", *flags)
    code, said = kubelet.cri.execute(pod.container, *words)
    assert (code, "Service default/web" in said, running.addresses["web-2"] in said) == (0, True, True), said


@pytest.mark.parametrize("program", ["pyproxy", "pynetd"])
def test_a_rolling_update_loses_nothing(running: Deployed, program: str) -> None:
    with under_load(running, f"update of {program}"):
        for node in running.kubelets:
            old = running.pods[program, node]
            new = running.replace(program, node)
            print(f"{program}: ended {old.took['end']:.2f} s, ready {new.took['readinessProbe']:.2f} s")


def test_another_mode_by_the_config_map_loses_nothing(running: Deployed) -> None:
    """cluster.env is edited and applied: the ConfigMap's new name is what rolls the DaemonSets."""
    settings = running.place / "deploy/cluster.env"
    with under_load(running, "nftables to iptables and back"):
        for mode in ("iptables", "nftables"):
            before = running.object("daemonsets", "pyproxy")["spec"]["template"]
            settings.write_text(re.sub("(?m)^MODE=.*", f"MODE={mode}", settings.read_text()))
            running.kubectl("apply", "-k", str(settings.parent))
            assert running.object("daemonsets", "pyproxy")["spec"]["template"] != before
            for node in running.kubelets:
                running.replace("pyproxy", node)
                assert agents.http_status(running.lab.folder, node, "127.0.0.1", 10249, "/proxyMode") == (200, mode)


def test_pods_are_made_while_no_agent_runs(running: Deployed) -> None:
    """The executables with their own runtime work alone; what the agent finds when it is back, it keeps."""
    kubelet = running.kubelets["node2"]
    kubelet.end(running.pods["pynetd", "node2"])
    address = running.pod("orphan", "node2", "tcp:8080")
    assert answering(running, "asker", address, 8080) == {"orphan"}
    running.run("pynetd", "node2")
    assert running.pod("child", "node2", "tcp:8080") != address
    assert answering(running, "child", address, 8080) == {"orphan"}


def test_what_changed_while_no_pyproxy_ran_is_made_up_for(running: Deployed) -> None:
    kubelet = running.kubelets["node1"]
    kubelet.end(running.pods["pyproxy", "node1"])
    publish(running, "web-2")
    running.run("pyproxy", "node1")
    assert answering(running, "asker", "10.96.0.80", 80) == {"web-2"}
    publish(running, "web-1", "web-2")


def test_a_rotated_token_is_taken_up(running: Deployed) -> None:
    """The kubelet turns the link; the old token is refused from then on, and connections are cut."""
    pod = running.pods["pyproxy", "node1"]
    account = "system:serviceaccount:kube-system:pyproxy"
    old, new = running.tokens["pyproxy"], token_for(account)
    tokens = running.server.tokens
    assert isinstance(tokens, dict)
    tokens[new] = account
    for node in running.kubelets:
        authority = (running.place / "ca.crt").read_text()
        folder = running.pods["pyproxy", node].folder
        write_volume(folder / "account", {"token": new, "ca.crt": authority, "namespace": "kube-system"})
    del tokens[old]
    running.tokens["pyproxy"] = new
    running.server.drop_connections()
    publish(running, "web-1")
    until("the change is seen", lambda: answering(running, "asker", "10.96.0.80", 80) == {"web-1"})
    publish(running, "web-1", "web-2")
    assert "ERROR" not in pod.log


def test_a_node_with_a_read_only_root_filesystem(running: Deployed) -> None:
    kubelet = running.kubelets["node2"]
    kubelet.runtime.run("sh", "-c", "for at in / /usr/lib /opt /etc; do mount -n -o remount,bind,ro $at; done")
    assert kubelet.runtime.run("touch", "/opt/x", check=False).returncode
    try:
        for program in ("pynetd", "pyproxy"):
            running.replace(program, "node2")
        running.pod("frugal", "node2", "tcp:8080")
        assert answering(running, "frugal", "10.96.0.80", 80) == {"web-1", "web-2"}
    finally:
        kubelet.runtime.run("sh", "-c", "for at in / /usr/lib /opt /etc; do mount -n -o remount,bind,rw $at; done")


def edited(daemonset: Json, container: str, **security: Any) -> Json:
    """Return a DaemonSet with another security context of one container."""
    changed: Json = json.loads(json.dumps(daemonset))
    spec = changed["spec"]["template"]["spec"]
    for each in (*spec.get("initContainers", ()), *spec["containers"]):
        if each["name"] == container:
            each["securityContext"] = security
    return changed


@pytest.mark.parametrize(
    ("program", "added", "said"),
    [
        ("pyproxy", (), "missing=CAP_NET_ADMIN"),
        ("pynetd", (), 'missing="CAP_NET_ADMIN CAP_SYS_ADMIN"'),
        ("pynetd", ("NET_ADMIN",), "missing=CAP_SYS_ADMIN"),
    ],
)
def test_without_privileges_a_daemon_says_what_it_lacks(
    running: Deployed, program: str, added: tuple[str, ...], said: str
) -> None:
    """Runtimes give NET_RAW and NET_BIND_SERVICE by themselves."""
    kubelet = running.kubelets["node2"]
    kubelet.end(running.pods[program, "node2"])
    bare = edited(running.object("daemonsets", program), program, capabilities={"add": list(added)})
    pod = kubelet.run(bare, running.config_maps(), running.tokens[program], wait=False)
    until(said, lambda: said in pod.log, 10)
    kubelet.end(pod)
    running.run(program, "node2")


def test_pyproxy_is_privileged_for_its_sysctls_alone(running: Deployed) -> None:
    """Where they are as it wants them, the capabilities that it keeps are enough."""
    kubelet = running.kubelets["node2"]
    kubelet.end(running.pods["pyproxy", "node2"])
    security = {"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE"]}}
    modest = edited(running.object("daemonsets", "pyproxy"), "pyproxy", **security)
    pod = kubelet.run(modest, running.config_maps(), running.tokens["pyproxy"])
    publish(running, "web-1")
    until("it writes", lambda: answering(running, "node2", "10.96.0.80", 80) == {"web-1"})
    publish(running, "web-1", "web-2")
    kubelet.end(pod)
    running.run("pyproxy", "node2")


@pytest.mark.parametrize("owner", [0, 997])
def test_the_init_step_has_the_capabilities_that_it_needs(running: Deployed, owner: int) -> None:
    """The folder of executables may be another user's, as some installers make it."""
    kubelet = running.kubelets["node2"]
    folder = running.place / "node2" / "bin"
    kubelet.end(running.pods["pynetd", "node2"])
    shutil.rmtree(folder / os.readlink(folder / "pynet-runtime"))
    os.chown(folder, owner, owner)
    try:
        without = edited(running.object("daemonsets", "pynetd"), "install", capabilities={"drop": ["ALL"]})
        if owner:
            with pytest.raises(Failed, match="Permission denied"):
                kubelet.run(without, running.config_maps(), running.tokens["pynetd"])
        running.run("pynetd", "node2")
        assert (folder / "pynet-runtime/VERSION").exists()
    finally:
        os.chown(folder, 0, 0)
