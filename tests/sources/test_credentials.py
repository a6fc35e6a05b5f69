"""Who we are to an API server: every way to say it, and that it is noticed when it changes."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from apiserver import Server
from apiserver.server import Tls
from pynet.sources import execplugin
from pynet.sources.credentials import Credentials
from pynet.sources.kubeconfig import BadCredentials
from pynet.sources.transport import Refused, Transport, Unreachable
from support.waiting import until


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, a server's certificate for another name than its address, and a client's."""
    place = tmp_path_factory.mktemp("keys")

    def run(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True)

    for name in ("authority", "stranger"):
        run("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt",
            "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    for name, alternative in (("server", "DNS:api.example"), ("client", "DNS:client"), ("local", "IP:127.0.0.1")):
        (place / f"{name}.ext").write_text(f"subjectAltName={alternative}\n")
        run("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "authority.crt", "-CAkey", "authority.key", "-days", "2",
            "-extfile", f"{name}.ext", "-out", f"{name}.crt")  # fmt: skip
    return place


@pytest.fixture
def secure(keys: Path) -> Iterator[Server]:
    tls = Tls(keys / "local.crt", keys / "local.key", keys / "authority.crt")
    with Server(tls=tls, tokens={"good"}) as running:
        yield running


def kubeconfig(folder: Path, running: Server, user: dict[str, Any], **cluster: Any) -> Path:
    path = folder / "kubeconfig"
    path.write_text(running.kubeconfig(user=user or {"username": ""}, cluster=cluster))
    return path


def ask(path: Path | None = None, master: str | None = None, environ: dict[str, str] | None = None) -> None:
    Transport(Credentials(path, master, environ)).get("/api/v1/nodes", {})


def test_a_token_over_tls(tmp_path: Path, secure: Server, keys: Path) -> None:
    ask(kubeconfig(tmp_path, secure, {"token": "good"}, **{"certificate-authority": str(keys / "authority.crt")}))


def test_data_in_the_file_and_files_beside_it(tmp_path: Path, secure: Server, keys: Path) -> None:
    def data(name: str) -> str:
        return base64.b64encode((keys / name).read_bytes()).decode()

    user = {"client-certificate-data": data("client.crt"), "client-key-data": data("client.key")}
    ask(kubeconfig(tmp_path, secure, user, **{"certificate-authority-data": data("authority.crt")}))
    for name in ("authority.crt", "client.crt", "client.key"):
        (tmp_path / name).write_bytes((keys / name).read_bytes())
    user = {"client-certificate": "client.crt", "client-key": "client.key"}
    ask(kubeconfig(tmp_path, secure, user, **{"certificate-authority": "authority.crt"}))


def test_a_server_of_an_unknown_authority_is_refused(tmp_path: Path, secure: Server, keys: Path) -> None:
    path = kubeconfig(tmp_path, secure, {"token": "good"}, **{"certificate-authority": str(keys / "stranger.crt")})
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        ask(path)
    ask(kubeconfig(tmp_path, secure, {"token": "good"}, **{"insecure-skip-tls-verify": True}))


def test_a_rotated_authority_is_read_anew(tmp_path: Path, secure: Server, keys: Path) -> None:
    bundle = tmp_path / "ca.crt"
    bundle.write_text((keys / "stranger.crt").read_text())
    path = kubeconfig(tmp_path, secure, {"token": "good"}, **{"certificate-authority": "ca.crt"})
    transport = Transport(Credentials(path))
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        transport.get("/api/v1/nodes", {})
    bundle.write_text((keys / "stranger.crt").read_text() + (keys / "authority.crt").read_text())
    transport.get("/api/v1/nodes", {})


def test_files_stand_beside_the_kubeconfig_also_where_that_is_a_link(
    tmp_path: Path, secure: Server, keys: Path
) -> None:
    real, linked = tmp_path / "real", tmp_path / "linked"
    real.mkdir()
    linked.mkdir()
    path = kubeconfig(real, secure, {"tokenFile": "token"}, **{"certificate-authority": "ca.crt"})
    (linked / "kubeconfig").symlink_to(path)
    (linked / "token").write_text("good")
    (linked / "ca.crt").write_text((keys / "authority.crt").read_text())
    ask(linked / "kubeconfig")


def test_the_servers_name_may_be_another_than_its_address(tmp_path: Path, keys: Path) -> None:
    with Server(tls=Tls(keys / "server.crt", keys / "server.key")) as server:
        authority = {"certificate-authority": str(keys / "authority.crt")}
        with pytest.raises(Unreachable, match="match"):
            ask(kubeconfig(tmp_path, server, {}, **authority))
        ask(kubeconfig(tmp_path, server, {}, **authority, **{"tls-server-name": "api.example"}))


@pytest.mark.parametrize("way", ["rewritten", "renamed into place", "behind a turned link"])
def test_a_rotated_token_file_is_read_anew(tmp_path: Path, way: str) -> None:
    with Server(tokens={"first"}) as server:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "token").write_text(f"{name}\n")
        (tmp_path / "now").symlink_to("first")
        (tmp_path / "token").symlink_to("now/token")
        user = {"tokenFile": "token", "token": "stale"}
        transport = Transport(Credentials(kubeconfig(tmp_path, server, user)))
        transport.get("/api/v1/nodes", {})
        server.tokens = {"second"}
        if way == "rewritten":
            (tmp_path / "first" / "token").write_text("second")
        elif way == "renamed into place":
            (tmp_path / "second" / "token").rename(tmp_path / "first" / "token")
        else:
            (tmp_path / "next").symlink_to("second")
            (tmp_path / "next").rename(tmp_path / "now")
        transport.get("/api/v1/nodes", {})


PLUGIN = """#!/bin/sh
echo run >> {log}
cat {answer}
"""


def plugin(folder: Path, status: dict[str, Any]) -> dict[str, Any]:
    """Return a user whose credentials a program gives; what it says can be rewritten."""
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    (folder / "answer").write_text(json.dumps(answer))
    program = folder / "plugin"
    program.write_text(PLUGIN.format(log=folder / "log", answer=folder / "answer"))
    program.chmod(0o755)
    api = "client.authentication.k8s.io/v1"
    return {"exec": {"apiVersion": api, "command": str(program), "interactiveMode": "Never"}}


def runs(folder: Path) -> int:
    return len((folder / "log").read_text().splitlines())


def test_a_plugins_token_is_kept_until_it_ends(tmp_path: Path) -> None:
    with Server(tokens={"one", "two"}) as server:
        later = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        soon = (datetime.now(UTC) + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        path = kubeconfig(tmp_path, server, plugin(tmp_path, {"token": "one", "expirationTimestamp": later}))
        transport = Transport(Credentials(path))
        transport.get("/api/v1/nodes", {})
        transport.get("/api/v1/nodes", {})
        assert runs(tmp_path) == 1
        path = kubeconfig(tmp_path, server, plugin(tmp_path, {"token": "two", "expirationTimestamp": soon}))
        transport = Transport(Credentials(path))
        transport.get("/api/v1/nodes", {})
        transport.get("/api/v1/nodes", {})
        assert runs(tmp_path) == 3


def test_a_refused_token_is_asked_for_anew(tmp_path: Path) -> None:
    with Server(tokens={"one"}) as server:
        path = kubeconfig(tmp_path, server, plugin(tmp_path, {"token": "one"}))
        transport = Transport(Credentials(path))
        transport.get("/api/v1/nodes", {})
        server.tokens = {"two"}
        plugin(tmp_path, {"token": "two"})
        with pytest.raises(Refused, match="401"):
            transport.get("/api/v1/nodes", {})
        transport.get("/api/v1/nodes", {})
        assert runs(tmp_path) == 2


def test_a_plugins_certificate(tmp_path: Path, secure: Server, keys: Path) -> None:
    status = {
        "clientCertificateData": (keys / "client.crt").read_text(),
        "clientKeyData": (keys / "client.key").read_text(),
    }
    authority = {"certificate-authority": str(keys / "authority.crt")}
    ask(kubeconfig(tmp_path, secure, plugin(tmp_path, status), **authority))


def test_a_plugin_that_fails_is_named(tmp_path: Path) -> None:
    with Server() as server:
        user = plugin(tmp_path, {})
        (tmp_path / "answer").write_text("no")
        with pytest.raises(BadCredentials, match="failed to decode"):
            Credentials(kubeconfig(tmp_path, server, user)).login()


def test_a_plugin_that_hangs_is_told_of_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With what it has started, also what keeps its output open; standard input is nobody's."""
    script = f"cat; sleep 1000 & echo $! > {tmp_path}/child; setsid sleep 0.5 & wait"
    wanted = {"apiVersion": f"{EXEC}/v1", "command": "sh", "args": ["-c", script]}
    with pytest.raises(execplugin.PluginFailed, match="'sh': no answer within 0 s, it was ended"):
        execplugin.ask(wanted, {}, tmp_path, slow=0.1, limit=0.3)
    assert [record.getMessage() for record in caplog.records] == ["exec plugin has not answered yet"]
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    until("it has died", lambda: state_of(child) in ("", "Z"))  # it is killed; that may take a moment


def state_of(stat: Path) -> str:
    try:
        return stat.read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_plugin_is_told_of_the_cluster_what_it_may_know(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("PEM")
    cluster = {
        "server": "https://a", "certificate-authority": "ca.crt", "proxy-url": "http://p",
        "extensions": [{"name": "client.authentication.k8s.io/exec", "extension": {"audience": "x"}}, {"name": "y"}],
    }  # fmt: skip
    told = {
        "server": "https://a", "certificate-authority-data": base64.b64encode(b"PEM").decode(),
        "proxy-url": "http://p", "config": {"audience": "x"},
    }  # fmt: skip
    wanted = {"apiVersion": f"{EXEC}/v1", "provideClusterInfo": True}
    assert execplugin.request(wanted, cluster, tmp_path) == {
        "apiVersion": f"{EXEC}/v1",
        "kind": "ExecCredential",
        "spec": {"interactive": False, "cluster": told},
    }
    assert "cluster" not in execplugin.request({"apiVersion": f"{EXEC}/v1"}, cluster, tmp_path)["spec"]


def test_in_a_pod_the_service_account_is_used(
    tmp_path: Path, secure: Server, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("good\n")
    base = "kubernetes.config.incluster_config"
    monkeypatch.setattr(f"{base}.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(f"{base}.SERVICE_CERT_FILENAME", str(keys / "authority.crt"))
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(secure.port)}
    ask(environ=environ)


def test_the_masters_address_wins(tmp_path: Path) -> None:
    with Server() as server:
        path = kubeconfig(tmp_path, server, {}, server="https://nowhere.example:1")
        ask(path, server.url)
        ask(master=server.url)
        ask(master=server.url.removeprefix("http://"))


class Proxy:
    """A proxy that counts who came through it (CONNECT, and plain requests by their whole address)."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(4096)
        method, target, _ = head.split(b" ", 2)
        self.seen.append(f"{method.decode()} {target.decode()}")
        host, _, port = target.removeprefix(b"http://").partition(b"/")[0].decode().partition(":")
        with client, socket.create_connection((host, int(port))) as server:
            if method == b"CONNECT":
                client.sendall(b"HTTP/1.1 200 ok\r\n\r\n")
            else:
                server.sendall(head)
            pump = threading.Thread(target=self._pump, args=(client, server), daemon=True)
            pump.start()
            self._pump(server, client)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


def test_a_proxy_named_by_the_kubeconfig(tmp_path: Path, secure: Server, keys: Path, proxy: Proxy) -> None:
    authority = {"certificate-authority": str(keys / "authority.crt"), "proxy-url": proxy.url}
    ask(kubeconfig(tmp_path, secure, {"token": "good"}, **authority))
    assert proxy.seen == [f"CONNECT 127.0.0.1:{secure.port}"]


def test_a_proxy_named_by_the_environment(
    tmp_path: Path, secure: Server, keys: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    path = kubeconfig(tmp_path, secure, {"token": "good"}, **{"certificate-authority": str(keys / "authority.crt")})
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    ask(path)
    assert len(proxy.seen) == 1
    monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
    ask(path)
    assert len(proxy.seen) == 1


def config(cluster: object = None, user: object = None, **fields: Any) -> str:
    """Return a kubeconfig's text with one cluster, user and context, and whatever is wrong with it."""
    document = {
        "current-context": "x",
        "contexts": [{"name": "other", "context": {}}, {"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"} if cluster is None else cluster}],
        "users": [{"name": "u", "user": user or {}}],
        **fields,
    }
    return yaml.safe_dump(document)


def running(script: str, **fields: Any) -> dict[str, Any]:
    """Return a user whose plugin is a shell script."""
    return {"exec": {"apiVersion": f"{EXEC}/v1", "command": "sh", "args": ["-c", script], **fields}}


EXEC = "client.authentication.k8s.io"
HTTPS = {"server": "https://127.0.0.1:1"}
AT = r"users\[u\].user.exec"
# What no waiting will mend: the daemons say so and end.
BROKEN = {
    "not YAML": ("{", "kubeconfig"),
    "not a kubeconfig": ("- a\n", "expected a kubeconfig"),
    "no context": ("clusters: []\n", "current-context: missing"),
    "an unknown context": ("current-context: x\n", "contexts: none is named 'x'"),
    "a context without cluster": (config(contexts=[{"name": "x"}]), r"contexts\[x\].context.cluster: missing"),
    "an unknown cluster": (config(clusters=[]), "clusters: none is named 'c'"),
    "an unknown user": (config(users=None), "users: none is named 'u'"),
    "clusters that are no list": (config(clusters={"c": {}}), "clusters: expected a list, found dict"),
    "no server": (config({}), r"clusters\[c\].cluster.server: missing"),
    "a server that is none": (config({"server": "a url"}), r"clusters\[c\].cluster.server: 'a url' is no address"),
    "a port that is none": (config({"server": "https://a:b"}), r"cluster.server: 'https://a:b' is no address"),
    "no base64": (config({**HTTPS, "certificate-authority-data": "%"}), "certificate-authority-data: no base64"),
    "no PEM": (config({**HTTPS, "certificate-authority-data": "aGVsbG8="}), "certificate-authority-data: expected PEM"),
    "a certificate without key": (config(user={"client-certificate": "x"}), "user.client-key: missing beside"),
    "a plugin without command": (config(user={"exec": {"apiVersion": f"{EXEC}/v1"}}), f"{AT}.command: missing"),
    "a plugin of no version": (config(user={"exec": {"command": "x"}}), f"{AT}.apiVersion: expected {EXEC}/v1 or"),
    "a plugin that wants to talk": (config(user=running("", interactiveMode="Always")), f"{AT}.interactiveMode: "),
}  # fmt: skip
# What may yet come right: the daemons say so once and go on trying.
AWAY = {
    "no authority's file": (config({**HTTPS, "certificate-authority": "x"}), "certificate-authority: .*no such"),
    "no token's file": (config(user={"tokenFile": "x"}), "user.tokenFile: .*no such file"),
    "a plugin that is not there": (
        config(user=running("", command="/no/x", installHint="get\nit")), f"{AT}.command: .*get it",
    ),
    "a plugin that fails": (config(user=running("echo oops >&2; exit 3")), f"{AT}: 'sh': process returned 3. oops"),
    "a plugin that prints garbage": (config(user=running("echo '<html>'")), f"{AT}: 'sh': failed to decode"),
    "a plugin that prints bytes": (config(user=running("printf '\\377'")), f"{AT}: 'sh': "),
    "a plugin that prints a list": (config(user=running("echo '[]'")), f"{AT}: 'sh': malformed response"),
    "a plugin of another version": (
        config(user=running(f"""echo '{{"apiVersion": "{EXEC}/v1beta1", "kind": "", "status": {{}}}}'""")),
        "does not match",
    ),
    "a plugin without key": (
        config(user=running(
            f"""echo '{{"apiVersion":"{EXEC}/v1","kind":"","status":{{"clientCertificateData":"x"}}}}'"""
        )),
        "gave no credentials: expected status.token",
    ),
    "a plugin's end that is no time": (
        config(user=running(
            f"""echo '{{"apiVersion":"{EXEC}/v1","kind":"","status":{{"token":"x","expirationTimestamp":"soon"}}}}'"""
        )),
        "status.expirationTimestamp: 'soon' is no time",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", [*BROKEN, *AWAY])
def test_a_broken_kubeconfig_is_named_with_its_field(
    tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    text, says = (BROKEN | AWAY)[wrong]
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(BadCredentials, match=says) as caught:
        Credentials(path).login()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(Unreachable):
        ask(path)
    if wrong in BROKEN:
        with pytest.raises(BadCredentials, match=says):
            Credentials(path).check()
    else:
        Credentials(path).check()
    assert not caplog.records  # the source says it, once


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("half a cert")
    (tmp_path / "kubeconfig").write_text(config({**HTTPS, "certificate-authority": "ca.crt"}))
    with pytest.raises(BadCredentials, match=r"clusters\[c\].cluster.certificate-authority: .*no cert"):
        Credentials(tmp_path / "kubeconfig").login()


def test_a_master_stands_in_for_a_server(tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text(config({}))
    assert Credentials(tmp_path / "kubeconfig", "https://[fd00::1]:6443/").login().configuration.host == (
        "https://[fd00::1]:6443"
    )
    with pytest.raises(BadCredentials, match="--master: 'a b' is no address"):
        Credentials(tmp_path / "kubeconfig", "a b").check()


@pytest.mark.parametrize("program", ["pyproxy", "pynetd"])
def test_a_daemon_with_a_kubeconfig_that_cannot_be_right_ends(tmp_path: Path, program: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(config({}))
    flags = {"pyproxy": ["--healthz-bind-address="], "pynetd": ["--state-dir", str(tmp_path)]}[program]
    daemon = {"pyproxy": "proxy.main", "pynetd": "cni.node.main"}[program]
    code = f"import sys; from {daemon} import main; sys.exit(main())"
    script = [sys.executable, "-c", code, "--kubeconfig", str(path), *flags]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"kubeconfig {path}: clusters[c].cluster.server: missing" in done.stderr


def test_a_kubeconfig_that_is_repaired_is_used(tmp_path: Path) -> None:
    with Server() as server:
        path = tmp_path / "kubeconfig"
        path.write_text("{")
        transport = Transport(Credentials(path))
        with pytest.raises(Unreachable):
            transport.get("/api/v1/nodes", {})
        kubeconfig(tmp_path, server, {})
        transport.get("/api/v1/nodes", {})
