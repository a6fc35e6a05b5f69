"""The CNI executable, installed and served by the agent, called as a runtime does."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.netns import Names, Namespace, programs
from support.nodes import Machine

pytestmark = pytest.mark.root


class Executable:
    """The installed executable, called as a runtime does with what the agent configured."""

    def __init__(self, own: Machine, folder: Path) -> None:
        own.space.run(str(programs() / "pynetd"), "install", f"--cni-bin-dir={folder}")
        conf = json.loads((own.conf / "10-pynet.conflist").read_text())
        self._config = {"cniVersion": "1.0.0", "name": conf["name"], **conf["plugins"][0]}
        self._own, self._folder = own, folder

    def __call__(self, verb: str, container: str, pod: Namespace, **more: Any) -> str:
        variables = {
            "CNI_COMMAND": verb, "CNI_CONTAINERID": container, "CNI_NETNS": pod.path, "CNI_IFNAME": "eth0",
            "CNI_PATH": str(self._folder),
        }  # fmt: skip
        words = [f"{key}={value}" for key, value in variables.items()]
        given = json.dumps({**self._config, **more})
        return self._own.space.run("env", *words, str(self._folder / "pynet-cni"), input=given)


def test_the_executable_is_served_and_counted(own: Machine, netns: Names, tmp_path: Path) -> None:
    own.start()
    folder = tmp_path / "bin"
    call = Executable(own, folder)
    assert sorted(entry.name for entry in folder.iterdir()) == ["pynet-cni", "pynet-ipam"]
    assert (folder / "pynet-cni").stat().st_mode & 0o777 == 0o755
    pod = netns("pod")
    result = json.loads(call("ADD", "c1", pod))
    assert result["ips"][0]["address"].startswith("10.244.1.")
    assert own.metric('pynetd_cni_requests_total{code="0",verb="ADD"}') == 1
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="used"}') == 1
    rules = own.space.run("nft", "list", "ruleset")
    assert rules.count("masquerade") == 2, f"the executable masquerades beside the agent:\n{rules}"
    call("CHECK", "c1", pod, prevResult=result)
    own.stop(signal.SIGKILL)
    own.start()
    call("CHECK", "c1", pod, prevResult=result)
    call("DEL", "c1", pod, prevResult=result)
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="used"}') == 0


CONTAINED = ("unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")


def test_an_agent_in_a_container_serves_what_needs_no_file_of_the_host(
    own: Machine, netns: Names, tmp_path: Path
) -> None:
    """It sees neither the caller's process nor its files: another IPAM plugin is left to the executable."""
    own.start(before=CONTAINED)
    call = Executable(own, tmp_path / "bin")
    pod, other = netns("pod"), netns("other")
    call("ADD", "c1", pod)
    assert own.metric('pynetd_cni_requests_total{code="0",verb="ADD"}') == 1
    (tmp_path / "bin/static").symlink_to("/usr/lib/cni/static")
    address = {"type": "static", "addresses": [{"address": "10.244.1.77/24"}]}
    assert json.loads(call("ADD", "c2", other, ipam=address))["ips"][0]["address"] == "10.244.1.77/24"
    assert own.metric('pynetd_cni_requests_total{code="0",verb="ADD"}') == 1
    call("DEL", "c2", other, ipam=address)
    call("DEL", "c1", pod)
    own.stop(signal.SIGKILL)  # unshare passes no SIGTERM on


def test_pods_come_up_while_the_agent_is_killed_and_started(own: Machine, netns: Names, tmp_path: Path) -> None:
    own.start()
    call = Executable(own, tmp_path / "bin")
    pods = [netns(f"pod{number}") for number in range(10)]
    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(call, "ADD", f"c{number}", pod) for number, pod in enumerate(pods)]
        for number in (signal.SIGKILL, signal.SIGTERM):
            own.stop(number)
            own.start()
        results = [json.loads(each.result()) for each in calls]
    addresses = {ip["address"] for result in results for ip in result["ips"]}
    assert len(addresses) == 20, "an address of each family for each pod"
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="used"}') == 10
    for number, (pod, result) in enumerate(zip(pods, results, strict=True)):
        assert "bytes from" in own.space.run("ping", "-c1", "-W3", result["ips"][0]["address"].partition("/")[0])
        call("DEL", f"c{number}", pod, prevResult=result)
    assert own.metric('pynetd_ipam_addresses{cidr="10.244.1.0/24",state="used"}') == 0
