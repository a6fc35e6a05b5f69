"""deploy/: what it says to a cluster and to systemd is what the programs take, and asks for no more than they use."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver import Server
from pynet.objects import KINDS, Ref
from pynet.sources.apievents import ApiEvents
from pynet.sources.credentials import Credentials
from pynet.sources.flags import source_from
from pynet.sources.transport import Transport
from sources import recorded
from support.netns import Names, programs

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
KUBECTL = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")


def documents(name: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((DEPLOY / name).read_text()) if each]


def container(name: str) -> dict[str, Any]:
    (daemonset,) = documents(f"{name}.yaml")
    (found,) = daemonset["spec"]["template"]["spec"]["containers"]
    return found


def arguments(name: str) -> list[str]:
    """Return a daemon's arguments as the kubelet would pass them."""
    values = dict(line.split("=", 1) for line in (DEPLOY / "cluster.env").read_text().split())
    values["NODE_NAME"] = "node1"
    return [re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in container(name)["args"]]


def allowed(name: str) -> set[tuple[str, str, str]]:
    """Return what a daemon's ClusterRole allows: group, resource, verb."""
    (role,) = [each for each in documents("rbac.yaml") if each["metadata"]["name"] == f"pynet:{name}"
               and each["kind"] == "ClusterRole"]  # fmt: skip
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.mark.parametrize(("name", "kinds"), [("pyproxy", set(KINDS)), ("pynetd", {"Node"})])
def test_a_role_allows_exactly_the_requests_that_are_made(name: str, kinds: set[str]) -> None:
    seen: set[tuple[str, str, str]] = set()
    for streaming in (True, False):
        with Server(streaming=streaming) as server:
            seen |= asked(server, name, kinds, set() if streaming else {"list"})
    assert seen == allowed(name)


def asked(server: Server, name: str, kinds: set[str], also: set[str]) -> set[tuple[str, str, str]]:
    """Return what a daemon's source and Events ask of a server, when each kind was watched."""
    args = argparse.Namespace(manifests=None, kubeconfig=None, master=server.url, kube_api_qps=0.0, kube_api_burst=None)
    stop = threading.Event()
    source = source_from(args, kinds, node="node1")
    worker = threading.Thread(target=source.run, args=(lambda _batch: None, stop))
    worker.start()
    clock = iter(range(0, 9999, 700))  # far enough apart that a repetition is told: by a patch
    events = ApiEvents(Transport(Credentials(None, server.url)), name, "node1", clock=lambda: float(next(clock)))
    events.emit("A", "first", Ref("Service", "default", "a"))
    events.emit("A", "first", Ref("Service", "default", "a"))
    events.close()
    plurals = {resource for _, resource, _ in allowed(name)} - {"events"}
    wanted = {(plural, verb) for plural in plurals for verb in {"watch"} | also}
    deadline = time.monotonic() + 20
    while True:
        seen = {(each.group, each.plural, each.verb) for each in list(server.requests)}
        if {(plural, verb) for _, plural, verb in seen} >= wanted or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    stop.set()
    worker.join(10)
    return seen


def test_pyproxys_arguments_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from proxy import flags

    words = [
        word.replace("/etc/pynet/pyproxy.yaml", str(DEPLOY / "config/pyproxy.yaml")) for word in arguments("pyproxy")
    ]
    args, settings = flags.parse(words)
    assert settings.node_name == "node1"
    assert str(args.kubeconfig) == "/etc/pynet/kubeconfig"


def test_pynetds_arguments_are_taken() -> None:
    from cni.node import main

    args = main._parser().parse_args(arguments("pynetd"))
    assert args.node_name == "node1"


@pytest.mark.parametrize("name", ["pyproxy", "pynetd"])
def test_every_mount_has_its_volume_and_every_probe_its_port(name: str) -> None:
    (daemonset,) = documents(f"{name}.yaml")
    spec = daemonset["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    used = {
        mount["name"] for each in spec["containers"] + spec.get("initContainers", []) for mount in each["volumeMounts"]
    }
    assert used == volumes
    ports = {container(name)[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert ports == ({10256} if name == "pyproxy" else {10270})


def test_the_kubeconfig_of_the_config_map_can_be_read(tmp_path: Path) -> None:
    document = yaml.safe_load((DEPLOY / "config/kubeconfig.yaml").read_text())
    (tmp_path / "token").write_text("t")
    document["users"][0]["user"]["tokenFile"] = str(tmp_path / "token")
    document["clusters"][0]["cluster"].pop("certificate-authority")
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(document))
    login = Credentials(tmp_path / "kubeconfig", "https://10.0.0.1:6443").login()
    assert login.configuration.host == "https://10.0.0.1:6443"
    assert login.configuration.auth_settings()["BearerToken"]["value"] == "Bearer t"


@KUBECTL
def test_one_command_deploys_all_of_it(tmp_path: Path) -> None:
    with Server() as server:
        (tmp_path / "kubeconfig").write_text(server.kubeconfig())
        environment = {**os.environ, "KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path)}

        def kubectl(*words: str) -> str:
            done = subprocess.run(["kubectl", *words], env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "daemonset.apps/pyproxy created" in kubectl("apply", "-k", str(DEPLOY))
        again = kubectl("apply", "-k", str(DEPLOY)).splitlines()
        assert all(line.endswith("unchanged") for line in again if "daemonset" not in line), again
        daemonset = json.loads(kubectl("get", "ds", "pyproxy", "-n", "kube-system", "-o", "json"))
        named = daemonset["spec"]["template"]["spec"]
        assert named["containers"][0]["image"] == "pynet:0.1.0"
        config = next(volume["configMap"]["name"] for volume in named["volumes"] if volume["name"] == "config")
        assert json.loads(kubectl("get", "cm", config, "-n", "kube-system", "-o", "json"))["data"].keys() == {
            "kubeconfig", "pyproxy.yaml",
        }  # fmt: skip
        kubectl("delete", "-k", str(DEPLOY))


def discovered() -> dict[tuple[str, str], tuple[str, set[str]]]:
    """Return what a real server serves: group and resource → kind with its version, and the verbs."""
    found: dict[tuple[str, str], tuple[str, set[str]]] = {}
    for name in ("discovery-aggregated-api", "discovery-aggregated-apis"):
        for group in recorded.answer(name)["body"]["items"]:
            named = group["metadata"].get("name", "")
            for version in group["versions"]:
                prefix = f"{named}/{version['version']}" if named else version["version"]
                for each in version["resources"]:
                    kind = f"{prefix} {each['responseKind']['kind']}"
                    found.setdefault((named, each["resource"]), (kind, set(each["verbs"])))
    return found


def test_a_real_server_serves_all_that_is_deployed_and_allowed() -> None:
    served = discovered()
    kinds = {kind for kind, _ in served.values()}
    names = [path.name for path in DEPLOY.glob("*.yaml") if path.name != "kustomization.yaml"]
    assert {f"{each['apiVersion']} {each['kind']}" for name in names for each in documents(name)} <= kinds
    for group, resource, verb in allowed("pyproxy") | allowed("pynetd"):
        assert verb in served[group, resource][1], (group, resource, verb)


def instructions() -> list[list[str]]:
    """Return the Dockerfile's instructions, in words."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [line.split() for line in lines if line.strip()]


def test_the_image_is_built_from_what_is_copied_into_it(tmp_path: Path) -> None:
    """Without the network: pip builds the wheel from the copied files alone, by the build back end of the lock file."""
    copied = [words[1:-1] for words in instructions() if words[0] == "COPY" and not words[1].startswith("--from")]
    for name in (name for names in copied for name in names):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / "src" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tmp_path / "src").mkdir(exist_ok=True)
            shutil.copy2(source, tmp_path / "src" / name)
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=tmp_path / "src", capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        inside = set(wheel.namelist())
        (entries,) = [wheel.read(name).decode() for name in inside if name.endswith("entry_points.txt")]
    modules = {str(path.relative_to(ROOT)) for top in ("pynet", "cni", "proxy") for path in (ROOT / top).rglob("*.py")}
    assert modules <= inside
    for name in ("pynetd", "pyproxy"):
        assert container(name)["command"] == [name]
        assert f"{name} = " in entries
    lock = (ROOT / "requirements.lock").read_text()
    wanted = yaml.safe_load(re.findall(r"(?m)^requires = (.*)$", (ROOT / "pyproject.toml").read_text())[0])
    assert all(re.search(rf"(?m)^{name}==", lock) for name in wanted)


def test_the_image_has_what_is_executed() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for path in re.findall(r"(?<!/)deploy/\S+/\S+", text):
        assert (ROOT / path).is_file() and os.access(ROOT / path, os.X_OK), path
    (install,) = documents("pynetd.yaml")[0]["spec"]["template"]["spec"]["initContainers"]
    for word in install["command"][:2]:
        assert re.search(rf"deploy/runtime/\S+ (\S+ )?{word}\b", text), word
    last = text[text.rindex("FROM ") :]
    tools = " ".join(path.read_text() for path in (ROOT / "pynet/kernel").glob("*.py"))
    for package, tool in {"iptables": "-restore", "nftables": '["nft"', "ipset": '["ipset"'}.items():
        assert tool in tools, tool
        assert f" {package} " in last, package


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("name", ["pyproxy", "pynetd"])
def test_systemd_takes_the_unit(name: str, tmp_path: Path) -> None:
    unit = tmp_path / f"{name}.service"
    text = (DEPLOY / "systemd" / unit.name).read_text()
    unit.write_text(re.sub(r"/opt/pynet/venv/bin/\S+", "/bin/true", text))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=50", unit]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["pyproxy", "pynetd"])
def test_a_unit_starts_on_a_fresh_host_and_its_program_takes_its_words(name: str, tmp_path: Path) -> None:
    """A path that is to be writable must be there (226/NAMESPACE), unless it may be missing or systemd makes it."""
    from cni.node import main
    from proxy import flags

    lines = (DEPLOY / f"systemd/{name}.service").read_text().splitlines()
    (writable,) = [line.partition("=")[2].split() for line in lines if line.startswith("ReadWritePaths=")]
    assert all(path.startswith("-") for path in writable)
    (start,) = [line.partition("=")[2].split() for line in lines if line.startswith("ExecStart=")]
    words = [word.replace("/etc/pynet/pyproxy.yaml", str(DEPLOY / "config/pyproxy.yaml")) for word in start[1:-1]]
    taken = flags.parse(words)[0] if name == "pyproxy" else main._parser().parse_args(words)
    assert taken.manifests == Path("/etc/pynet/manifests")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    out = tmp_path_factory.mktemp("runtime")
    subprocess.run([DEPLOY / "runtime/build", out], check=True, capture_output=True)
    return out


def version(executable: Path, *before: str) -> dict[str, Any]:
    words = [*before, str(executable)]
    done = subprocess.run(words, env={"CNI_COMMAND": "VERSION"}, input=b"", capture_output=True, check=True)
    return json.loads(done.stdout)


def test_the_runtime_runs_wherever_it_is_put(runtime: Path, tmp_path: Path) -> None:
    for place in ("one", "another place"):
        target = tmp_path / place
        subprocess.run([DEPLOY / "runtime/install", runtime, target], check=True)
        for name in ("pynet-cni", "pynet-ipam"):
            assert "1.1.0" in version(target / name)["supportedVersions"]


def test_a_second_install_changes_all_at_once(runtime: Path, tmp_path: Path) -> None:
    target = tmp_path / "bin"
    subprocess.run([DEPLOY / "runtime/install", runtime, target], check=True)
    other = tmp_path / "other"
    shutil.copytree(runtime, other, symlinks=True)
    (other / "pynet-runtime/VERSION").write_text("other\n")
    subprocess.run([DEPLOY / "runtime/install", other, target], check=True)
    assert os.readlink(target / "pynet-runtime") == ".pynet-other"
    assert "1.1.0" in version(target / "pynet-cni")["supportedVersions"]
    assert not list(target.glob("*.new")) and not list(target.glob(".*.new"))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: chroot")
def test_the_runtime_needs_nothing_of_the_host(runtime: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    subprocess.run([DEPLOY / "runtime/install", runtime, root / "opt/cni/bin"], check=True)
    script = 'mount -t proc proc "$0/proc" && exec chroot "$0" /opt/cni/bin/pynet-cni'
    found = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, root], env={"CNI_COMMAND": "VERSION", "PATH": os.environ["PATH"]},
        input=b"", capture_output=True, check=True,
    )  # fmt: skip
    assert "1.1.0" in json.loads(found.stdout)["supportedVersions"]


def test_the_image_keeps_what_the_programs_need() -> None:
    done = subprocess.run([sys.executable, DEPLOY / "image/prune", "-n"], capture_output=True, text=True, check=True)
    kept = set(done.stdout.split())
    assert {"pynet", "kubernetes", "msgspec", "pyyaml", "prometheus-client", "urllib3"} <= kept
    assert not {"pytest", "mypy", "scapy", "grpcio", "ruff", "pyroute2", "python-iptables"} & kept


@pytest.mark.root
@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["pyproxy", "--mode=nftables"], "CAP_NET_ADMIN"),
        (["pyproxy", "--mode=iptables"], '"CAP_NET_ADMIN CAP_NET_RAW"'),
        (["pynetd"], '"CAP_NET_ADMIN CAP_NET_RAW"'),
    ],
)
def test_a_missing_capability_is_named(words: list[str], missing: str, netns: Names, tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    command = ["setpriv", "--bounding-set=-net_admin,-net_raw", f"{programs()}/{words[0]}", *words[1:]]
    command += [f"--manifests={tmp_path}/objects", *([f"--state-dir={tmp_path}"] if words[0] == "pynetd" else [])]
    line = ["ip", "netns", "exec", netns("bare").name, *command]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert f'msg="cannot start: capabilities are missing" missing={missing}' in done.stderr.splitlines()[-1]
