"""A real containerd for a test: own root, state and socket folders, own mount namespace, in a given network namespace.

`build_image` makes a small image of busybox-static on the spot; `Containerd` starts the daemon, imports it, runs
containers through a CNI configuration folder (`ctr run --cni`), and with `cri=True` serves the CRI as well. `close`
leaves nothing: no process, mount, cgroup or file. In the private mount namespace /run, /etc, /opt, /lib and /var/lib
are its own (paths that containerd and pods have built in), whatever else is under /run can be seen as it is on the
host, or nothing of it (`alone=True`): then it is a machine of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

IMAGE = "localhost/pynet-busybox:1"
BUSYBOX = "/bin/busybox"
APPLETS = ("sh", "sleep", "wget", "httpd", "nc", "ip", "cat", "echo", "hostname", "env")
WHO = """#!/bin/sh
echo Content-Type: text/plain
echo
echo $(/bin/busybox tr '\\0' '\\n' </proc/1/environ | /bin/busybox grep ^NAME=) $REMOTE_ADDR
"""

SETUP = """
set -e
old=$1 tmp=$2 conf=$3 bin=$4 netns=$5 seen=$6; shift 6
mount -n --make-rslave /
mount -n --rbind /run "$old"
mount -n -t tmpfs -o mode=755 tmpfs /run
for entry in "$old"/$seen/; do
    name=$(basename "$entry")
    [ "$name" != containerd ] && [ -d "$entry" ] || continue
    mkdir -p "/run/$name"; mount -n --rbind "$old/$name" "/run/$name"
done
mount -n -t tmpfs tmpfs "$tmp"
for place in etc opt usr/lib var/lib; do
    mkdir -p "$tmp/$place/up" "$tmp/$place/work" "/$place"
    mount -n -t overlay overlay -o "lowerdir=/$place,upperdir=$tmp/$place/up,workdir=$tmp/$place/work" "/$place"
done
mkdir -p /etc/cni/net.d /opt/cni/bin /lib/modules
mount -n --bind "$conf" /etc/cni/net.d
mount -n --bind "$bin" /opt/cni/bin
mkdir "$tmp/cgroup"; mount -n --rbind /sys/fs/cgroup "$tmp/cgroup"
mount -n --make-rshared /
exec nsenter --net="$old/netns/${netns##*/}" sh -c '
    mount -n -t sysfs sysfs /sys; mount -n --rbind "$0/cgroup" /sys/fs/cgroup; exec "$@"' "$tmp" "$@"
"""


def why_not() -> str:
    """Return why a containerd cannot be started here; empty: it can."""
    for program in ("containerd", "ctr", "runc", "busybox", "nsenter", "unshare"):
        if not shutil.which(program):
            return f"{program} is not installed"
    return "" if os.geteuid() == 0 else "needs root"


def build_image(path: Path) -> None:
    """Write an OCI image archive: busybox, a few links to it, and a page that says who serves and who asked."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in ("bin", "proc", "sys", "dev", "etc", "tmp", "www", "www/cgi-bin"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        binary = Path(shutil.which("busybox") or BUSYBOX).read_bytes()
        for name, data in ((BUSYBOX[1:], binary), ("www/cgi-bin/who", WHO.encode())):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
        for applet in APPLETS:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    content = layer.getvalue()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
    }
    blobs: list[bytes] = []

    def descriptor(kind: str, data: bytes) -> dict[str, object]:
        blobs.append(data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest, "size": len(data)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", json.dumps(config).encode()),
        "layers": [descriptor("layer.v1.tar", content)],
    }
    entry = descriptor("manifest.v1+json", json.dumps(manifest).encode())
    index = {
        "schemaVersion": 2,
        "manifests": [
            {
                **entry,
                "annotations": {"io.containerd.image.name": IMAGE, "org.opencontainers.image.ref.name": "1"},
                "platform": {"architecture": "amd64", "os": "linux"},
            }
        ],
    }
    files = {f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}": blob for blob in blobs}
    files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    files["index.json"] = json.dumps(index).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))


CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = [{disabled}]
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = {hidden}
  [plugins."io.containerd.grpc.v1.cri".cni]
    conf_dir = "/etc/cni/net.d"
    bin_dir = "/opt/cni/bin"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
"""


class Containerd:
    """A running containerd. `netns`: path of the network namespace that is its host; `conf_dir`, `bin_dir`: CNI's.

    `env`: settings that plugins shall see. `socket`: where its gRPC interface (and the CRI's) is reached.
    """

    def __init__(
        self,
        netns: str,
        folder: Path,
        conf_dir: Path,
        bin_dir: Path,
        *,
        cri: bool = False,
        env: dict[str, str] | None = None,
        alone: bool = False,
        images: Sequence[Path] = (),
    ) -> None:
        """`images`: archives to import beside the small one; then snapshots are overlays, as copies would cost."""
        self.folder = folder
        self.socket = folder / "containerd.sock"
        if len(str(self.socket)) > 100:
            raise ValueError(f"{self.socket}: too long for a unix socket")
        self.namespace = f"pynet{os.getpid()}"
        self._cgroups_before = _cgroup_folders(self.namespace)
        for name in ("old", "tmp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        disabled = "" if cri else '"io.containerd.grpc.v1.cri"'
        self._snapshotter = "overlayfs" if images else "native"
        text = CONFIG.format(
            folder=folder,
            disabled=disabled,
            image=IMAGE,
            snapshotter=self._snapshotter,
            hidden=str(not alone).lower(),
        )
        (folder / "config.toml").write_text(text)
        (folder / "setup.sh").write_text(SETUP)
        self.log = folder / "containerd.log"
        command = ["unshare", "--mount", "--propagation", "slave", "sh", str(folder / "setup.sh")]
        command += [str(folder / "old"), str(folder / "tmp"), str(conf_dir), str(bin_dir), netns]
        command.append("none" if alone else "*")
        command += ["containerd", "--config", str(folder / "config.toml"), "--log-level", "info"]
        with self.log.open("wb") as out:
            self._daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        self.env = env or {}
        try:
            self._wait()
            self._import(cri, images)
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"containerd did not start:\n{self.log.read_text()[-3000:]}")
            if self.socket.exists() and self.ctr("version", check=False).returncode == 0:
                return
            time.sleep(0.05)

    def _import(self, cri: bool, images: Sequence[Path]) -> None:
        archive = self.folder / "image.tar"
        build_image(archive)
        namespaces = (self.namespace, "k8s.io") if cri else (self.namespace,)
        for namespace in namespaces:
            for path in (archive, *(images if namespace == "k8s.io" else ())):
                self.run("ctr", "-a", str(self.socket), "-n", namespace, "images", "import", "--snapshotter",
                         self._snapshotter, str(path))  # fmt: skip
        archive.unlink()

    @property
    def pid(self) -> int:
        """The daemon's process: whose namespaces are the machine."""
        return self._daemon.pid

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command where containerd is: its mount and network namespaces."""
        line = ["nsenter", f"--target={self._daemon.pid}", "--mount", "--net", *command]
        done = subprocess.run(
            line, text=True, capture_output=True, check=False, timeout=timeout, env={**os.environ, **self.env}
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}\n"
                f"{self.log.read_text()[-2000:]}"
            )
        return done

    def ctr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ctr on this daemon."""
        return self.run("ctr", "-a", str(self.socket), "-n", self.namespace, *arguments, check=check)

    def start(self, name: str, *command: str, cni: bool = True) -> None:
        """Start a container in the background, wired through CNI."""
        wiring = ["--cni"] if cni else []
        options = ["--cgroup", "", "--snapshotter", self._snapshotter, "--env", f"NAME={name}"]
        self.ctr("run", "--detach", *wiring, *options, IMAGE, name, *command)

    def exec(self, name: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a container."""
        return self.ctr("tasks", "exec", "--exec-id", f"e{time.monotonic_ns()}", name, *command, check=check)

    def ask(self, name: str, *command: str) -> str:
        """Return what a command in a container says; ctr at times loses the output of a short one: then ask again."""
        for _ in range(5):
            if said := self.exec(name, *command).stdout:
                return said
        raise AssertionError(f"{name}: {' '.join(command)}: said nothing, five times")

    def stop(self, name: str) -> None:
        """End a container and remove it (ctr calls CNI DEL only in the foreground: the caller sees to the wiring)."""
        self.ctr("tasks", "kill", "--signal", "KILL", name, check=False)
        self.ctr("tasks", "delete", "--force", name, check=False)
        self.ctr("containers", "delete", name, check=False)

    def close(self) -> None:
        """Leave nothing behind."""
        if self._daemon.poll() is None:
            listed = self.ctr("containers", "list", "-q", check=False).stdout.split()
            for name in listed:
                self.stop(name)
        deadline = time.monotonic() + 10
        while (pids := _family(self._daemon.pid, self.folder)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._daemon.poll()
            time.sleep(0.02)
        self._daemon.wait(10)
        for folder in _cgroup_folders(self.namespace) - self._cgroups_before:
            with contextlib.suppress(OSError):
                folder.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)


def _cgroup_folders(namespace: str) -> set[Path]:
    root = Path("/sys/fs/cgroup")
    return {path for name in (namespace, "k8s.io") for path in (*root.glob(f"*/{name}"), *root.glob(name))}


def _family(daemon: int, folder: Path) -> set[int]:
    """Return the daemon, its shims (which name its socket in their command line), and all their descendants."""
    parents: dict[int, int] = {}
    found = {daemon} if Path(f"/proc/{daemon}").exists() else set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if stat[0] == "Z":
                found.discard(int(entry))
                continue
            parents[int(entry)] = int(stat[1])
            if str(folder).encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.add(int(entry))
        except OSError:
            continue
    found.discard(os.getpid())
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found
