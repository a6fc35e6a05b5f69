"""A container runtime in small: calls a CNI executable in a host namespace as containerd does, keeps its results."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.netns import Namespace, programs
from support.waiting import until

NSENTER = shutil.which("nsenter") or "nsenter"
REFERENCE = Path("/usr/lib/cni")
_ids = itertools.count()
FORKING = """
import json, os, sys
from cni import ctl, verbs
from cni.context import Context
for line in sys.stdin:
    environment, stdin = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        ctl._KILL_AT = environment.pop("PYNET_CNI_KILL_AT", "")
        context = Context()
        answer = verbs.serve(environment, stdin.encode(), context)
        context.close()
        os.write(writing, answer.output.encode())
        os._exit(answer.code)
    os.close(writing)
    with open(reading) as pipe:
        output = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, output]), flush=True)
"""


class CniFailure(Exception):
    """An executable that exited with an error: its error object, or what it printed instead."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        super().__init__(f"exit {code}\n{stdout}\n{stderr}")
        self.exit = code
        try:
            self.answer: dict[str, Any] = json.loads(stdout)
        except ValueError:
            self.answer = {}
        self.code = self.answer.get("code")
        self.message = str(self.answer.get("msg", ""))
        self.details = str(self.answer.get("details", ""))


class Runtime:
    """Calls plugins in `host`, each Runtime with a state folder of its own."""

    def __init__(self, host: Namespace, state: Path, program: Path | None = None) -> None:
        self.host = host
        self.state = state
        self.program = program or programs() / "pynet-cni"

    def conf(self, version: str = "1.1.0", **keys: Any) -> dict[str, Any]:
        base = {
            "cniVersion": version,
            "name": "net",
            "type": "pynet-cni",
            "bridge": "cni0",
            "stateDir": str(self.state),
        }
        return base | keys

    def call(
        self, command: str, conf: Any, container: str = "", netns: str = "", ifname: str = "eth0",
        env: dict[str, str] | None = None, program: Path | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Run one verb; return its decoded output, {} for none. Raise `CniFailure`."""
        stdin = conf if isinstance(conf, str) else json.dumps(conf)
        done = subprocess.run(
            [NSENTER, f"--net={self.host.path}", str(program or self.program)],
            input=stdin, text=True, capture_output=True, timeout=60, check=False,
            env=self.environment(command, container, netns, ifname, env),
        )  # fmt: skip
        if done.returncode:
            raise CniFailure(done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def environment(
        self, command: str, container: str, netns: str, ifname: str, env: dict[str, str] | None
    ) -> dict[str, str]:
        """Return a call's environment; what is empty is not set."""
        found = {
            "PATH": os.environ["PATH"], "CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_NETNS": netns,
            "CNI_IFNAME": ifname, "CNI_PATH": f"{programs()}:{REFERENCE}",
        } | (env or {})  # fmt: skip
        return {key: value for key, value in found.items() if value}


class Forking(Runtime):
    """Calls the plugin in children of one process that has everything loaded: ten times faster than the executable."""

    def __init__(self, host: Namespace, state: Path) -> None:
        super().__init__(host, state)
        self._parent = host.start(
            sys.executable,
            "-c",
            FORKING,
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def call(
        self, command: str, conf: Any, container: str = "", netns: str = "", ifname: str = "eth0",
        env: dict[str, str] | None = None, program: Path | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        environment = self.environment(command, container, netns, ifname, env)
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps([environment, json.dumps(conf)]) + "\n")
        self._parent.stdin.flush()
        status, output = json.loads(self._parent.stdout.readline())
        if status:
            raise CniFailure(status, output, "")
        found: dict[str, Any] = json.loads(output) if output else {}
        return found


class Pod:
    """A namespace and the attachment that a runtime makes in it."""

    def __init__(self, runtime: Runtime, namespace: Namespace, container: str = "") -> None:
        self.runtime = runtime
        self.ns = namespace
        self.container = container or f"pod{os.getpid()}-{next(_ids)}"
        self.conf: dict[str, Any] = {}
        self.result: dict[str, Any] = {}

    def add(self, conf: dict[str, Any], **options: Any) -> dict[str, Any]:
        self.conf = conf
        self.result = self.runtime.call("ADD", conf, self.container, self.ns.path, **options)
        return self.result

    def delete(self, conf: dict[str, Any] | None = None, **options: Any) -> None:
        given = {"netns": self.ns.path} | options
        assert self.runtime.call("DEL", conf or self.conf, self.container, **given) == {}

    def check(self, conf: dict[str, Any] | None = None) -> None:
        with_result = (conf or self.conf) | {"prevResult": self.result}
        assert self.runtime.call("CHECK", with_result, self.container, self.ns.path) == {}

    def vanish(self) -> None:
        """Let the namespace go, and wait for its links, which the kernel takes away in its own time."""
        self.ns.close()
        veth = next(one["name"] for one in self.result["interfaces"] if one["name"].startswith("veth"))
        until(f"{veth} is gone", lambda: veth not in links(self.runtime.host))

    def addresses(self, family: str = "-4") -> list[str]:
        return addresses(self.ns, "eth0", family)

    @property
    def ip(self) -> str:
        return str(self.result["ips"][0]["address"]).partition("/")[0]


def addresses(namespace: Namespace, link: str, family: str = "-4") -> list[str]:
    shown = json.loads(namespace.run("ip", "-j", family, "addr", "show", "dev", link) or "[]")
    return [
        f"{a['local']}/{a['prefixlen']}"
        for entry in shown
        for a in entry.get("addr_info", ())
        if a["scope"] == "global"
    ]


def links(namespace: Namespace) -> dict[str, dict[str, Any]]:
    return {link["ifname"]: link for link in json.loads(namespace.run("ip", "-j", "-d", "link"))}


def residue(namespace: Namespace) -> dict[str, Any]:
    """Return what an attachment could leave in a host: links (but for bridges' states), addresses, rules."""
    shown = ("ip -j -d link", "ip -j addr", "nft list ruleset", "iptables-nft-save", "tc qdisc show")
    output = namespace.run("sh", "-c", " && echo ---- && ".join(shown))
    found, addressed, nft, iptables, qdisc = output.split("----\n")
    return {
        "links": {
            link["ifname"]: (link.get("linkinfo", {}).get("info_kind"), link.get("ifalias"))
            for link in json.loads(found)
        },
        "addresses": sorted(
            a["local"] for entry in json.loads(addressed) for a in entry["addr_info"] if a["scope"] == "global"
        ),
        "nft": nft,
        "iptables": [line for line in iptables.splitlines() if line.startswith("-A")],
        "qdisc": qdisc,
    }
