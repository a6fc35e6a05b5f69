"""Flags and kube-proxy's configuration file: the same settings from both, and clear words for what cannot be."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from proxy import flags
from proxy.config import ConfigError, Settings, surroundings
from proxy.main import write_config
from proxy.plan import Family, LocalDetector, LocalKind
from proxy.values import boolean, duration
from pynet.objects import Metadata, Node, NodeAddress, NodeSpec, NodeStatus

NODE = Node(
    Metadata(name="n1", labels={"topology.kubernetes.io/zone": "a"}),
    NodeSpec(pod_cidr="10.244.3.0/24", pod_cidrs=("10.244.3.0/24", "fd00:3::/64")),
    NodeStatus(tuple(NodeAddress("InternalIP", address) for address in ("192.168.0.3", "fd00::3"))),
)
KUBEADM = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  {acceptContentTypes: "", burst: 0, contentType: "", kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: 2h,
   udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables: {localhostNodePorts: null, masqueradeAll: true, masqueradeBit: 15, minSyncPeriod: 2s, syncPeriod: 1m0s}
ipvs:
  {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: "", strictARP: true, syncPeriod: 0s, tcpFinTimeout: 0s,
   tcpTimeout: 0s, udpTimeout: 0s}
logging:
  {flushFrequency: 0, options: {json: {infoBufferSize: "0"}, text: {infoBufferSize: "0"}}, verbosity: 0}
metricsBindAddress: ""
mode: ""
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: null, syncPeriod: null}
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: "", rootHnsEndpointName: "", sourceVip: ""}
"""


def settings(*arguments: str) -> Settings:
    return flags.parse(["--manifests", "/tmp", "--hostname-override", "n1", *arguments])[1]


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--mode=nftables"], "mode", "nftables"),
        (["--proxy-mode", "ipvs"], "mode", "ipvs"),
        (["--cluster-cidr", "10.244.0.0/16, fd00::/48"], "cluster_cidrs", ("10.244.0.0/16", "fd00::/48")),
        (["--masquerade-all"], "masquerade_all", True),
        (["--masquerade-all=false"], "masquerade_all", False),
        (["--iptables-sync-period", "1m30s"], "sync_seconds", 90.0),
        (["--iptables-min-sync-period=500ms"], "min_sync_seconds", 0.5),
        (["--ipvs-sync-period=9s", "--iptables-sync-period=8s"], "sync_seconds", 8.0),
        (["--ipvs-sync-period=9s", "--iptables-sync-period=8s", "--mode=ipvs"], "sync_seconds", 9.0),
        (["--proxy-mode="], "mode", "iptables"),
        (["--cluster_cidr=10.0.0.0/8", "--skip_headers", "--stderrthreshold=2"], "cluster_cidrs", ("10.0.0.0/8",)),
        (["--nodeport-addresses", "primary,10.0.0.5/8"], "node_port_addresses", ("primary", "10.0.0.0/8")),
        (["--iptables-localhost-nodeports=false"], "localhost_node_ports", False),
        (["--conntrack-max-per-core", "0"], "conntrack.max_per_core", 0),
        (["--conntrack-tcp-be-liberal"], "conntrack.tcp_be_liberal", True),
        (["--ipvs-scheduler", "lc"], "ipvs.scheduler", "lc"),
        (["--feature-gates", "A=true,B=false"], "feature_gates", {"A": True, "B": False}),
        ([], "node_name", "n1"),
        ([], "mode", "iptables"),
    ],
)
def test_flags(arguments: list[str], field: str, value: object) -> None:
    found: object = settings(*arguments)
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize("flag", ["--profiling", "--config-sync-period=15m", "--kube-api-burst=10", "--v=2"])
def test_flags_of_kube_proxy_without_meaning_are_accepted(flag: str) -> None:
    settings(flag)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode=bpf"], "--mode"),
        (["--cluster-cidr=10.0.0.0"], "--cluster-cidr"),
        (["--detect-local-mode=BridgeInterface"], "--pod-bridge-interface"),
        (["--iptables-masquerade-bit=32"], "--iptables-masquerade-bit"),
        (["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix", 'x" -j ACCEPT'], "interface"),
        (["--iptables-backend=bpf"], "--iptables-backend"),
        (["--bind-address=host"], "--bind-address"),
        (["--iptables-sync-period=0s"], "--iptables-sync-period"),
        (["--oom-score-adj=-1001"], "--oom-score-adj"),
        (["--conntrack-min=-1"], "--conntrack-min"),
        (["--conntrack-max-per-core=-1"], "--conntrack-max-per-core"),
    ],
)
def test_what_cannot_be_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(*arguments)


def test_kubeadms_file_is_taken_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text(KUBEADM)
    found = settings("--config", str(file), "--iptables-masquerade-bit=13")
    assert (found.cluster_cidrs, found.masquerade_all, found.masquerade_bit) == (("10.244.0.0/16",), True, 13)
    assert (found.sync_seconds, found.min_sync_seconds) == (60.0, 2.0)
    assert found.conntrack.tcp_established_seconds == 7200
    assert (found.healthz_bind, found.mode, found.ipvs.strict_arp) == ("0.0.0.0:10256", "iptables", True)
    args, _ = flags.parse(["--config", str(file), "--hostname-override", "n1"])
    assert str(args.kubeconfig) == "/var/lib/kube-proxy/kubeconfig.conf"
    file.write_text(KUBEADM.replace("minSyncPeriod: 2s, syncPeriod: 1m0s", "minSyncPeriod: 0s, syncPeriod: 0s"))
    _, untouched = flags.parse(["--config", str(file), "--hostname-override", "n1"])
    assert (untouched.sync_seconds, untouched.min_sync_seconds) == (
        Settings().sync_seconds,
        Settings().min_sync_seconds,
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("iptabels: {}", "iptabels"),
        ("iptables: {masqueradeBits: 3}", r"iptables.*masqueradeBits|masqueradeBits.*iptables"),
        ("clusterCIDR: 5", "clusterCIDR"),
        ("mode: iptables\nmode: ipvs", "twice"),
        ("iptables: {syncPeriod: soon}", "syncPeriod"),
    ],
)
def test_the_files_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.conf"
    file.write_text(f"apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{text}\n")
    with pytest.raises(ConfigError, match=said):
        settings("--config", str(file))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text("apiVersion: v1\nkind: ConfigMap\n")
    with pytest.raises(ConfigError, match="KubeProxyConfiguration"):
        settings("--config", str(file))


@pytest.mark.parametrize(
    ("arguments", "family", "detector"),
    [
        (["--cluster-cidr=10.0.0.0/8"], Family.V4, LocalDetector(LocalKind.CIDR, ("10.0.0.0/8",))),
        (["--cluster-cidr=10.0.0.0/8"], Family.V6, LocalDetector()),
        ([], Family.V4, LocalDetector()),
        (["--detect-local-mode=NodeCIDR"], Family.V6, LocalDetector(LocalKind.CIDR, ("fd00:3::/64",))),
        (
            ["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"],
            Family.V4,
            LocalDetector(LocalKind.BRIDGE, interface="cni0"),
        ),
    ],
)
def test_detectors(arguments: list[str], family: Family, detector: LocalDetector) -> None:
    around = surroundings(settings(*arguments), family, NODE)
    assert around.settings.detector == detector
    assert around.place.zone == "a"
    assert around.node_ips == (("192.168.0.3",) if family is Family.V4 else ("fd00::3",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("primary", ("192.168.0.3/32",)),
        ("localhost", ("127.0.0.0/8",)),
        ("all", ()),
        ("10.0.0.0/8", ("10.0.0.0/8",)),
        ("fd00::/8", ()),
        ("0.0.0.0/0", ()),
    ],
)
def test_node_port_addresses(text: str, expected: tuple[str, ...]) -> None:
    around = surroundings(settings(*([f"--nodeport-addresses={text}"] if text else [])), Family.V4, NODE)
    assert around.settings.node_port_addresses == expected


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("1h2m3s", 3723), ("1.5s", 1.5), ("15", 15), ("100us", 1e-4)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5x", "1s2", "-1s", "1 s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError):
        duration(text)


def test_booleans() -> None:
    assert boolean("true")
    assert not boolean("F")
    with pytest.raises(ValueError):
        boolean("yes")


def test_the_file_that_is_written_means_the_same_when_it_is_read(tmp_path: Path) -> None:
    kubeadm, written = tmp_path / "kubeadm", tmp_path / "written"
    kubeadm.write_text(KUBEADM)
    for arguments in ([], ["--config", str(kubeadm)], ["--mode=nftables", "--conntrack-tcp-be-liberal", "-v2"]):
        given = ["--hostname-override=n1", "--nodeport-addresses=primary,10.0.0.0/8", "--conntrack-min=7", *arguments]
        args, expected = flags.parse([*given, "--write-config-to", str(written)])
        assert write_config(args, expected) == 0
        found = flags.parse(["--config", str(written)])[1]
        assert msgspec.structs.replace(found, mode_is_default=expected.mode_is_default) == expected


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_config(*flags.parse(["--write-config-to", str(tmp_path / "no" / "such")])) == 2
    assert "no/such: No such file or directory" in capsys.readouterr().err


def test_every_flag_and_the_value_in_use() -> None:
    args, found = flags.parse(["--cluster-cidr=10.0.0.0/8,fd00::/8", "--iptables-sync-period=1m", "--masquerade-all"])
    shown = flags.in_use(args, found)
    assert {"cluster-cidr": "10.0.0.0/8,fd00::/8", "iptables-sync-period": "60s", "masquerade-all": "true"}.items() <= (
        shown.items()
    )
    assert (shown["config"], shown["mode"], shown["oom-score-adj"]) == ("", "iptables", "-999")
