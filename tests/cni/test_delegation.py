"""IPAM by other executables, and ours under another main plugin: their results, their errors, the rollback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cni import REFERENCE, CniFailure, Pod, Runtime, residue

pytestmark = pytest.mark.root

FOUR = {"type": "pynet-ipam", "ranges": [[{"subnet": "10.9.0.0/24"}]]}


DELEGATE = """#!/bin/sh
echo "$CNI_COMMAND $(cat)" >> FOLDER/calls
[ $CNI_COMMAND = ADD ] || exit 0
ANSWER
"""


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        ('echo \'{"code": 107, "msg": "no lease", "details": "dhcp"}\'; exit 1', 107, "no lease"),
        ("echo broken; exit 1", 100, "broken"),
        ("echo nonsense", 6, "is not JSON"),
        ('echo \'{"cniVersion": "1.0.0", "ips": [{"address": "nowhere"}]}\'', 6, "nowhere"),
        ('echo \'{"cniVersion": "1.0.0"}\'', 100, "returned no IP address"),
    ],
)
def test_a_delegate_that_fails_is_called_again_to_undo(
    runtime: Runtime, pod: Pod, tmp_path: Path, answer: str, code: int, words: str
) -> None:
    """The specification's rollback: DEL with the complete configuration, and the delegate's error is ours."""
    plugin = tmp_path / "delegate"
    plugin.write_text(DELEGATE.replace("FOLDER", str(tmp_path)).replace("ANSWER", answer))
    plugin.chmod(0o755)
    before = residue(runtime.host)
    conf = runtime.conf("1.0.0", isGateway=True, ipMasq=True, ipam={"type": "delegate", "own": 1})
    with pytest.raises(CniFailure) as failed:
        pod.add(conf, env={"CNI_PATH": str(tmp_path)})
    assert failed.value.code == code
    assert words in failed.value.message
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [(line.partition(" ")[0], json.loads(line.partition(" ")[2])) for line in calls] == [
        ("ADD", conf), ("DEL", conf)
    ]  # fmt: skip
    assert residue(runtime.host) == before


def test_ipam_by_static_and_by_a_dhcp_without_its_daemon(runtime: Runtime, pod: Pod) -> None:
    static = {
        "type": "static", "addresses": [{"address": "10.9.0.5/24", "gateway": "10.9.0.1"}, {"address": "fd00:9::5/64"}],
        "routes": [{"dst": "0.0.0.0/0"}], "dns": {"nameservers": ["9.9.9.9"]},
    }  # fmt: skip
    conf = runtime.conf("1.0.0", isGateway=True, ipam=static)
    result = pod.add(conf)
    assert pod.addresses() + pod.addresses("-6") == ["10.9.0.5/24", "fd00:9::5/64"]
    assert result["ips"][1]["gateway"] == "fd00:9::1"
    assert result["dns"] == {"nameservers": ["9.9.9.9"]}
    assert "default via 10.9.0.1" in pod.ns.run("ip", "route")
    pod.check()
    pod.delete()
    before = residue(runtime.host)
    with pytest.raises(CniFailure, match="IPAM plugin dhcp"):
        pod.add(conf | {"ipam": {"type": "dhcp"}})
    assert residue(runtime.host) == before


def test_ipam_by_host_local(runtime: Runtime, pod: Pod, tmp_path: Path) -> None:
    ipam = {"type": "host-local", "dataDir": str(tmp_path / "hl"), "ranges": [[{"subnet": "10.9.0.0/24"}]]}
    conf = runtime.conf("1.0.0", isDefaultGateway=True, ipMasq=True, ipam=ipam)
    pod.add(conf)
    assert pod.addresses() == ["10.9.0.2/24"]
    assert (tmp_path / "hl" / "net" / "10.9.0.2").exists()
    pod.check()
    pod.delete()
    assert not (tmp_path / "hl" / "net" / "10.9.0.2").exists()
    broken = conf | {"ipam": ipam | {"routes": [{"dst": "10.0.0.0/8", "gw": "192.0.2.77"}]}}
    with pytest.raises(CniFailure):
        pod.add(broken)
    assert list((tmp_path / "hl" / "net").glob("10.*")) == []
    with pytest.raises(CniFailure, match="no plugin nobody in CNI_PATH"):
        pod.add(conf | {"ipam": {"type": "nobody"}})


def test_our_ipam_under_another_main_plugin(runtime: Runtime, pod: Pod) -> None:
    conf = runtime.conf("1.0.0", isDefaultGateway=True, ipam=FOUR) | {"type": "bridge"}
    bridge = REFERENCE / "bridge"
    result = pod.add(conf, program=bridge)
    assert result["ips"][0]["address"] == "10.9.0.2/24"
    runtime.call("CHECK", conf | {"prevResult": result}, pod.container, pod.ns.path, program=bridge)
    pod.delete(program=bridge)
    assert pod.add(conf, program=bridge)["ips"][0]["address"] == "10.9.0.3/24"
    pod.delete(program=bridge)
