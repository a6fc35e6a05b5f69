"""IPAM by other executables, and ours under another main plugin: their results, their errors, the rollback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cni import delegate, spec
from support.cni import REFERENCE, CniFailure, Pod, Runtime, links, residue
from support.waiting import until

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


TELLING = """#!/usr/bin/env python3
import json, os, sys
conf, verb = json.load(sys.stdin), os.environ["CNI_COMMAND"]
with open("FOLDER/calls", "a") as log:
    env = {key: value for key, value in os.environ.items() if key.startswith("CNI_")}
    print(json.dumps([verb, conf, env]), file=log)
print("said to the log", file=sys.stderr)
if os.path.exists(f"FOLDER/refuse-{verb}"):
    print(json.dumps({"cniVersion": "1.1.0", "code": 123, "msg": f"no {verb} today", "details": "of the delegate"}))
    sys.exit(1)
if verb == "ADD":
    print(json.dumps({"cniVersion": "1.1.0", "ips": [{"address": "10.9.0.5/24", "gateway": "10.9.0.1"}]}))
"""


def test_every_verb_goes_on_to_the_delegate(runtime: Runtime, pod: Pod, tmp_path: Path) -> None:
    """With the complete configuration and the same environment; what the delegate refuses, the plugin refuses."""
    plugin = tmp_path / "telling"
    plugin.write_text(TELLING.replace("FOLDER", str(tmp_path)))
    plugin.chmod(0o755)
    env = {"CNI_PATH": str(tmp_path), "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=x"}
    conf = runtime.conf(isGateway=True, ipam={"type": "telling", "own": {"deep": [1]}}, unknown="kept")
    pod.add(conf, env=env)
    with_result = conf | {"prevResult": pod.result}
    valid = conf | {"cni.dev/valid-attachments": [{"containerID": pod.container, "ifname": "eth0"}]}

    def call(verb: str) -> None:
        given = {"CHECK": with_result, "GC": valid, "DEL": with_result}.get(verb, conf)
        names = (pod.container, pod.ns.path) if verb in ("CHECK", "DEL") else ()
        runtime.call(verb, given, *names, env=env, ifname="eth0" if names else "")

    for verb, code in (("STATUS", 50), ("CHECK", 123), ("GC", 123), ("DEL", 123)):
        call(verb) if verb != "DEL" else None
        (tmp_path / f"refuse-{verb}").touch()
        with pytest.raises(CniFailure, match=f"IPAM plugin telling: no {verb} today") as refused:
            call(verb)
        assert refused.value.code == code
        assert verb in ("GC", "DEL") or refused.value.details == "of the delegate"
        (tmp_path / f"refuse-{verb}").unlink()
    call("DEL")
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [verb for verb, _, _ in calls] == ["ADD", "STATUS", "STATUS", "CHECK", "CHECK", "GC", "GC", "DEL", "DEL"]
    for verb, given, seen in calls:
        assert given == {"CHECK": with_result, "GC": valid, "DEL": with_result}.get(verb, conf)
        assert (seen["CNI_PATH"], seen["CNI_ARGS"]) == (env["CNI_PATH"], env["CNI_ARGS"])
        if verb in ("ADD", "CHECK", "DEL"):
            shown = [seen[f"CNI_{key}"] for key in ("CONTAINERID", "NETNS", "IFNAME")]
            assert shown == [pod.container, pod.ns.path, "eth0"]
    assert "eth0" not in links(pod.ns)
    assert runtime.host.run("nft", "list", "ruleset") == ""


def test_host_local_is_checked_and_its_reservation_missed(runtime: Runtime, pod: Pod, tmp_path: Path) -> None:
    ipam = {"type": "host-local", "dataDir": str(tmp_path / "hl"), "subnet": "10.9.0.0/24"}
    pod.add(runtime.conf("1.0.0", isGateway=True, ipam=ipam))
    (tmp_path / "hl" / "net" / pod.ip).unlink()
    with pytest.raises(CniFailure, match="IPAM plugin host-local: host-local: Failed to find address"):
        pod.check()
    pod.delete()


def test_a_delegate_that_hangs_is_ended(
    runtime: Runtime, pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it has started, that holds its output open, is not waited for."""
    plugin = tmp_path / "hanging"
    plugin.write_text(
        "#!/bin/sh\ncat > /dev/null; sleep 30 &\necho $! >> PIDS; [ $CNI_COMMAND = DEL ] || wait\n".replace(
            "PIDS", str(tmp_path / "pids")
        )
    )
    plugin.chmod(0o755)
    monkeypatch.setattr(delegate, "_SECONDS", 0.5)
    config = runtime.conf(ipam={"type": "hanging"})
    request = spec.Request("ADD", "c", pod.ns.path, "eth0", {}, str(tmp_path), config, json.dumps(config).encode())
    begun = time.monotonic()
    for verb in ("ADD", "DEL"):
        with pytest.raises(spec.CniError, match=f"IPAM plugin hanging: no answer to {verb} in 0.5 s") as late:
            delegate.run(verb, request, "hanging", {"PATH": os.environ["PATH"]})
        assert late.value.code == 11
    assert time.monotonic() - begun < 20
    for pid in (tmp_path / "pids").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


DHCP = """
import socket, struct, sys
given = {}
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"cni0")
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
s.bind(("", 67)); print("ready", flush=True)
while True:
    data, _ = s.recvfrom(2000)
    mac, options, at = data[28:34], {}, 240
    while at < len(data) and data[at] != 255:
        if data[at] == 0: at += 1; continue
        options[data[at]] = data[at + 2 : at + 2 + data[at + 1]]; at += 2 + data[at + 1]
    kind = options[53][0]
    if kind not in (1, 3): continue
    ip = bytes((10, 9, 0, given.setdefault(mac, 50 + len(given))))
    server, mask = bytes((10, 9, 0, 1)), bytes((255, 255, 255, 0))
    head = (2, 1, 6, 0, data[4:8], 0, 0x8000, b"", ip, server, b"", data[28:44], b"c\\x82Sc")
    reply = struct.pack("!BBBB4sHH4s4s4s4s16s192x4s", *head)
    reply += bytes((53, 1, 2 if kind == 1 else 5, 54, 4, *server, 51, 4, 0, 0, 14, 16, 1, 4, *mask, 3, 4, *server, 255))
    s.sendto(reply, ("255.255.255.255", 68))
"""


def test_ipam_by_a_dhcp_server(runtime: Runtime, pod: Pod, tmp_path: Path) -> None:
    """It asks through the pod's interface, which has to be there and attached before."""
    host, path = runtime.host, str(tmp_path / "dhcp.sock")
    host.batch("link add cni0 type bridge", "addr add 10.9.0.1/24 dev cni0", "link set cni0 up")
    server = host.start(sys.executable, "-c", DHCP, stdout=-1)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    host.start(
        str(REFERENCE / "dhcp"), "daemon", "-socketpath", path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until("the dhcp daemon listens", lambda: os.path.exists(path))
    before = residue(host)
    mappings = {"portMappings": [{"hostPort": 8080, "containerPort": 80}]}
    ipam = {"type": "dhcp", "daemonSocketPath": path}
    result = pod.add(runtime.conf("1.0.0", isDefaultGateway=True, ipMasq=True, ipam=ipam, runtimeConfig=mappings))
    assert pod.addresses() == ["10.9.0.50/24"]
    assert result["ips"] == [{"interface": 2, "address": "10.9.0.50/24", "gateway": "10.9.0.1"}]
    assert " 10.9.0.50 " in str(links(host)[result["interfaces"][1]["name"]]["ifalias"])
    pod.ns.run("ping", "-c1", "-W2", "10.9.0.1")
    pod.check()
    pod.delete()
    after = residue(host)
    assert after == before | {"qdisc": after["qdisc"]}
