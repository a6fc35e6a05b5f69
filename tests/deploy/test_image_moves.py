"""docs/migrate.md at work on the nodes of a try (`make try-image`): from kube-proxy and flannel, and back."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from netnslab import machine
from support.deployed import ROOT, Deployed, answering, publish, under_load
from support.kubelet import Kubelet
from support.waiting import until

if not os.environ.get("PYNET_IMAGE"):
    pytest.skip("no PYNET_IMAGE: `make try-image` builds one", allow_module_level=True)
pytestmark = [pytest.mark.root, pytest.mark.slow]
NAME = "pynet:0.1.0"
# What kubeadm writes for kube-proxy (1.36), the fields that are empty there as well.
KUBEADM = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null,
  udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "", strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s,
  tcpTimeout: 0s, udpTimeout: 0s}
kind: KubeProxyConfiguration
logging: {flushFrequency: 0, options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}, verbosity: 0}
metricsBindAddress: ""
mode: ""
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: "", rootHnsEndpointName: "", sourceVip: ""}
"""  # noqa: E501
# What kube-proxy's iptables mode leaves behind for the Service, in its own chains.
KUBE_RULES = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-WEB - [0:0]
:KUBE-EXT-WEB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d 10.96.0.80/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -d 10.96.0.80/32 -p udp -m udp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT-WEB
-A KUBE-NODEPORTS -p udp -m udp --dport 30080 -j KUBE-EXT-WEB
-A KUBE-EXT-WEB -j KUBE-MARK-MASQ
-A KUBE-EXT-WEB -j KUBE-SVC-WEB
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
-A KUBE-SVC-WEB ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ
-A KUBE-SVC-WEB -p tcp -j DNAT --to-destination WEB:8080
-A KUBE-SVC-WEB -p udp -j DNAT --to-destination WEB:8080
COMMIT
"""


def test_services_move_from_kube_proxy_and_back(running: Deployed) -> None:
    """docs/migrate.md's steps on a node that has kube-proxy's rules, its ConfigMap being ours; nothing is lost."""
    kubelet = running.kubelets["node1"]
    inside = ("ip", "netns", "exec", running.lab.node("node1").netns)
    kube = re.findall(r":(KUBE-\S+)", KUBE_RULES)

    def rules(add: bool) -> None:
        if add:
            machine.run(
                [*inside, "iptables-restore", "-n"], input=KUBE_RULES.replace("WEB:", f"{running.addresses['web-1']}:")
            )
            return
        gone = [line.replace("-A ", "-D ", 1) for line in KUBE_RULES.splitlines()
                if re.match("-A (PREROUTING|OUTPUT|POSTROUTING)", line)]  # fmt: skip
        gone += [f"-F {chain}" for chain in kube] + [f"-X {chain}" for chain in kube]
        machine.run([*inside, "iptables-restore", "-n"], input="\n".join(["*nat", *gone, "COMMIT", ""]))

    def ours() -> str:
        return machine.run([*inside, "sh", "-c", "nft list tables; iptables-save"]).stdout

    kubelet.end(running.pods["pyproxy", "node1"])
    assert kubelet.debug(NAME, "pyproxy", "--cleanup", "--mode=nftables")[0] == 0
    assert "PYNET" not in ours()
    assert "pynet-proxy" not in ours()
    rules(add=True)
    settings = running.place / "deploy/config/pyproxy.yaml"
    before = settings.read_text()
    settings.write_text(KUBEADM)
    running.kubectl("apply", "-k", str(running.place / "deploy"))
    try:
        with under_load(running, "from kube-proxy and back"):
            pod = running.run("pyproxy", "node1")
            rules(add=False)
            kubelet.end(pod)
            rules(add=True)
            assert kubelet.debug(NAME, "pyproxy", "--cleanup", "--mode=nftables")[0] == 0
            assert "KUBE-SVC-WEB" in ours()
            assert "PYNET" not in ours()
            assert "pynet-proxy" not in ours()
            running.run("pyproxy", "node1")
            rules(add=False)
    finally:
        settings.write_text(before)
        running.kubectl("apply", "-k", str(running.place / "deploy"))
        running.replace("pyproxy", "node1")


CLEANUP = ("pynetd", "--cleanup", "--state-dir=/host/run/pynet", "--cni-conf-dir=/host/etc/cni/net.d")


def test_pods_move_back_from_pynet(running: Deployed) -> None:
    """The node is empty, the agent is gone: of ours nothing stays, and the configuration of before is whole."""
    kubelet = running.kubelets["node2"]
    netns = running.lab.node("node2").netns
    conf = running.place / "node2" / "conf"
    (conf / "10-flannel.conflist").write_text("{}")
    kubelet.end(running.pods["pynetd", "node2"])
    code, said = kubelet.debug(NAME, *CLEANUP)
    assert code == 0, said
    assert os.listdir(conf) == ["10-flannel.conflist"]
    (conf / "10-flannel.conflist").unlink()
    assert machine.run(["ip", "-n", netns, "route", "show", "proto", "112"]).stdout == ""
    assert "pynet" not in machine.run(["ip", "netns", "exec", netns, "nft", "list", "tables"]).stdout.replace(
        "pynet-proxy", ""
    )
    running.run("pynetd", "node2")


FLANNEL = """{"name": "cbr0", "cniVersion": "1.0.0", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true,
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.2.0/24"}]], "routes": [{"dst": "10.244.0.0/16"}]}}]}"""


def drain(kubelet: Kubelet) -> None:
    """End the pods of a node, but those of its own network."""
    for sandbox in set(kubelet.cri.sandboxes) - {pod.sandbox for pod in kubelet.pods}:
        kubelet.cri.stop(sandbox)
        kubelet.cri.remove(sandbox)


def wires_to(deployed: Deployed, bridge: str) -> bool:
    """Tell whether the runtime of node2 joins a pod to that bridge now."""
    cri = deployed.kubelets["node2"].cri
    sandbox = cri.run("probe")
    ports = machine.run(["ip", "-n", deployed.lab.node("node2").netns, "link", "show", "master", bridge], check=False)
    cri.stop(sandbox)
    cri.remove(sandbox)
    return "veth" in ports.stdout


def test_pods_move_from_flannel(running: Deployed) -> None:
    """The commands of docs/migrate.md on a node whose pods are flannel's: the other nodes reach both kinds of pods."""
    text = (ROOT / "docs/migrate.md").read_text()
    commands = text[text.index("mkdir -p /var/lib/pynet/before") :].partition("```")[0]
    kubelet = running.kubelets["node2"]
    conf = running.place / "node2" / "conf"
    for name in ("bridge", "host-local"):
        shutil.copy2(f"/usr/lib/cni/{name}", running.place / "node2" / "bin")
    publish(running, "web-1")
    drain(kubelet)
    kubelet.end(running.pods["pynetd", "node2"])
    assert kubelet.debug(NAME, *CLEANUP)[0] == 0
    (conf / "10-flannel.conflist").write_text(FLANNEL)
    other = running.kubelets["node1"].address
    route = ("ip", "-n", running.lab.node("node2").netns, "route")
    machine.run([*route, "add", "10.244.1.0/24", "via", other])  # flannel's, of host-gw
    until("the runtime knows flannel", lambda: wires_to(running, "cni0"))
    old = running.pod("old", "node2", "tcp:8080")
    assert answering(running, "asker", old, 8080) == {"old"}
    running.run("pynetd", "node2")
    pod = running.pods["pynetd", "node2"].container
    assert "10-flannel.conflist" in kubelet.cri.execute(pod, "pynetd", "status")[1]
    assert answering(running, "asker", old, 8080) == {"old"}
    drain(kubelet)
    kubelet.runtime.run("sh", "-ec", commands)
    until("the runtime knows ours", lambda: wires_to(running, "pynet0"))
    new = running.pod("new", "node2", "tcp:8080")
    assert answering(running, "asker", new, 8080) == {"new"}
    assert answering(running, "new", "10.96.0.80", 80) == {"web-1"}
    assert "10-flannel.conflist" not in kubelet.cri.execute(pod, "pynetd", "status")[1]
    machine.run([*route, "del", "10.244.1.0/24", "via", other, "proto", "boot"])
    ours = (*route, "show", "10.244.1.0/24", "proto", "112")
    until("pynetd's route takes its place", lambda: other in machine.run(ours).stdout)
    assert answering(running, "asker", new, 8080) == {"new"}
