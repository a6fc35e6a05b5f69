"""An agent's life: its sources, its start, restart and end, its health, what it says of itself, its clean-up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from apiserver import Server
from pynet.kernel import netns as netns_of
from support.netns import programs
from support.nodes import Machine, write
from support.peers import events_of, far, near, overlay_of, ways_are
from support.waiting import until

pytestmark = pytest.mark.root


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restart_changes_nothing(own: Machine, number: int) -> None:
    near(own, 2)
    far(own, 3)
    own.start()
    before = (own.routes(), own.routes(6), overlay_of(own), own.space.run("nft", "list", "table", "inet", "pynet-node"))
    happened = events_of(own)
    own.stop(number)
    own.start()
    assert "proto 112" not in happened()
    after = (own.routes(), own.routes(6), overlay_of(own), own.space.run("nft", "list", "table", "inet", "pynet-node"))
    assert after == before
    assert own.metric('pynetd_route_changes_total{verb="added"}') == 0


def test_cleanup_leaves_what_was_there_before(own: Machine) -> None:
    near(own, 2)
    far(own, 3)
    own.ip_command("route", "add", "10.244.60.0/24", "via", "192.168.1.60", "proto", "static")
    own.space.run("iptables", "-P", "FORWARD", "DROP")

    def seen() -> tuple[str, ...]:
        return (
            own.space.run("ip", "-N", "route"),
            own.space.run("ip", "-N", "-6", "route"),
            own.space.run("ip", "-j", "link"),
            own.space.run("nft", "list", "ruleset"),
            own.space.run("ipset", "save"),
        )

    before = seen()
    own.start()
    own.stop(signal.SIGKILL)
    own.space.run(str(programs() / "pynetd"), "--cleanup", f"--state-dir={own.state}", f"--cni-conf-dir={own.conf}")
    assert seen() == before
    assert list(own.conf.iterdir()) == []
    assert sorted(entry.name for entry in own.state.iterdir()) == ["net.d"]


def test_a_broken_manifest_takes_no_route(own: Machine) -> None:
    near(own, 2)
    own.start()
    write(own.manifests / "n2.yaml", "kind: Node\nmetadata: {na")
    near(own, 3)
    ways_are(own, {"10.244.2.0/24": "192.168.1.2 eth0", "10.244.3.0/24": "192.168.1.3 eth0"})


def test_health_before_and_after_the_first_reconcile(own: Machine) -> None:
    hidden = own.manifests.rename(own.manifests.with_name("hidden"))
    own.start(ready=False)
    until("alive", lambda: own.get("/healthz")[0] == 200)
    assert own.get("/readyz")[0] == 503
    hidden.rename(own.manifests)
    until("ready", lambda: own.get("/readyz")[0] == 200)
    assert own.get("/metrics")[0] == 200
    assert own.metric('pynetd_routes_wanted{family="4"}') == 1
    assert own.metric('pynetd_routes_present{family="4"}') == 1
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="free"}') == 253


def test_until_the_source_has_spoken_nothing_is_removed(own: Machine) -> None:
    own.ip_command("route", "add", "10.244.2.0/24", "via", "192.168.1.2", "proto", "112")
    hidden = own.manifests.rename(own.manifests.with_name("hidden"))
    own.start(ready=False)
    until("alive", lambda: own.get("/healthz")[0] == 200)
    assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0"}
    hidden.rename(own.manifests)
    ways_are(own, {})


def test_nodes_of_an_api_server(own: Machine, tmp_path: Path) -> None:
    space = netns_of.open_path(own.space.path)
    with netns_of.inside(space):
        server = Server()
    os.close(space)
    try:
        server.put(own.manifest(), own.manifest(name="n2", cidrs=["10.244.2.0/24"], ips=["192.168.1.2"]))
        (tmp_path / "kubeconfig").write_text(server.kubeconfig())
        own.start(source=f"--kubeconfig={tmp_path / 'kubeconfig'}")
        assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0"}
        server.put(own.manifest(name="n2", cidrs=["10.244.2.0/24"], ips=["192.168.1.3"]))
        ways_are(own, {"10.244.2.0/24": "192.168.1.3 eth0"})
        server.drop_connections()
        server.delete(own.manifest(name="n2"))
        ways_are(own, {})
    finally:
        server.stop()


def test_status_prints_peers_and_reasons(own: Machine) -> None:
    near(own, 2)
    far(own, 3)
    own.start()
    command = [str(programs() / "pynetd"), "status", f"--state-dir={own.state}"]
    text = own.space.run(*command)
    assert "running, pid" in text
    assert "192.168.1.2 is on link: eth0 has 192.168.1.0/24" in text
    assert "192.168.2.3 is behind 192.168.1.254" in text
    found: dict[str, Any] = json.loads(own.space.run(*command, "--output=json"))
    assert {each["cidr"]: each["how"] for each in found["peers"]}["10.244.3.0/24"] == "vxlan"
    own.stop(signal.SIGKILL)
    assert "NOT RUNNING" in own.space.run(*command)
    missing = subprocess.run(
        [str(programs() / "pynetd"), "status", "--state-dir=/nonexistent"], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1
    assert "no agent has reconciled with that --state-dir" in missing.stderr


def test_a_second_agent_of_one_state_directory_is_refused(own: Machine) -> None:
    """And so is a clean-up under a running agent."""
    near(own, 2)
    own.start()
    first = own.agent
    cleanup = own.space.start(str(programs() / "pynetd"), "--cleanup", f"--state-dir={own.state}")
    own.start(ready=False)
    second, own.agent = own.agent, first
    assert second is not None
    assert (second.wait(30), cleanup.wait(30)) == (1, 1)
    assert "another pynetd serves this state directory" in own.log.read_text()
    assert own.ways() == {"10.244.2.0/24": "192.168.1.2 eth0"}, "cleaned up under a running agent"
