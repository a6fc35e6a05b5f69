"""A virtual machine with Debian's stock kernel over this machine's own file system, and how to get one.

Knows packages, qemu's options and the way into the guest; knows nothing of pytest. As a program it runs one command in
the guest (`machine.py COMMAND…`), a shell when no command is given.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "vm"
GUEST = Path(__file__).with_name("guest")

QUICK = "loglevel=3 mitigations=off audit=0 rcupdate.rcu_expedited=1"  # what an emulated processor need not do

READY, EXIT = b"pynet-guest: ready", b"pynet-guest: exit "  # what the script `guest` says on its console

# program that must be there → the Debian package that has it
PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "ipvsadm": "ipvsadm",
    "depmod": "kmod",
    "busybox": "busybox-static",
}
# Runs a command in a process group that ends with whoever holds the other end of the pipe ($0): a machine whose pytest
# was killed must not go on for minutes.
_TIED = """lifeline=$0
{ read -r -u "$lifeline"; kill -KILL -- -$$; } &
watcher=$!
"$@"
status=$?
kill $watcher
exit $status"""

# Metapackages that name a kernel, best first. The cloud kernels lack 9p.
KERNELS = ("linux-image-amd64", "linux-image-6.12-amd64")


class Unavailable(Exception):
    """There can be no virtual machine here; the message says why."""


def kernel() -> Path:
    """Return the kernel image to boot, its modules beside it; get what is missing first. Raise `Unavailable`."""
    if os.uname().machine != "x86_64":
        raise Unavailable(f"the virtual machine's kernel is built for x86_64, this machine is {os.uname().machine}")
    if os.geteuid() != 0:
        raise Unavailable("the virtual machine lane needs root, as the tests that run in it do")
    environment = _environment()
    missing = sorted({package for program, package in PACKAGES.items() if not _which(program, environment)})
    if missing:
        _apt(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing])
    if not _which("vng", environment):
        raise Unavailable("virtme-ng is not in the virtual environment: run tools/setup")
    found = _unpacked()
    return found or _unpack()


def boot(
    command: Sequence[str],
    image: Path,
    *,
    share: Path | None = None,
    memory: str = "2G",
    script: Path = GUEST,
    **streams: object,
) -> subprocess.Popen[bytes]:
    """Boot `image`, run `command` in the repository as root, power off.

    The guest sees this machine's files as they are now; what it writes is lost, except under `share`, which it sees at
    its own path. Console and output of the command go to the child's standard output.
    """
    shares = [_share("fast", "/", writable=False)]
    words = [f"ROOT={ROOT}"]
    if share is not None:
        shares.append(_share("share", str(share), writable=True))
        words.append(f"SHARE={share}")
    reader, writer = os.pipe()
    quoted = " ".join(_quote(word) for word in ("env", *words, "sh", str(script), *command))
    machine: subprocess.Popen[bytes] = subprocess.Popen(  # type: ignore[call-overload]
        [
            "bash", "-c", _TIED, str(reader),
            "vng", "--verbose", "--disable-kvm", "--force-9p", "--disable-microvm",
            "-r", str(image), "--memory", memory, "--cpus", str(min(os.cpu_count() or 1, 4)), "--user", "root",
            "--append", QUICK, f"--qemu-opts={' '.join(shares)}",
            "--cwd", "/", "--exec", quoted,
        ],
        env=_environment(), start_new_session=True, pass_fds=[reader], **{"stdin": subprocess.DEVNULL, **streams},
    )  # fmt: skip
    os.close(reader)
    machine.lifeline = writer  # type: ignore[attr-defined]  # held open for as long as this process lives
    return machine


def stop(machine: subprocess.Popen[bytes]) -> None:
    """End a machine, with all of its processes, whether it has finished or not."""
    if machine.poll() is None:
        os.killpg(machine.pid, signal.SIGKILL)
    machine.wait()
    os.close(machine.lifeline)  # type: ignore[attr-defined]


def _share(tag: str, path: str, *, writable: bool) -> str:
    mode = "" if writable else ",readonly=on"
    return (
        f"-fsdev local,id={tag},path={path},security_model=none{mode},multidevs=remap"
        f" -device virtio-9p-pci,fsdev={tag},mount_tag={tag}"
    )


def _quote(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _environment() -> dict[str, str]:
    paths = [str(ROOT / ".venv" / "bin"), "/usr/lib/qemu", os.environ.get("PATH", ""), "/usr/sbin:/sbin"]
    return {**os.environ, "PATH": ":".join(paths)}


def _which(program: str, environment: dict[str, str]) -> str | None:
    return shutil.which(program, path=environment["PATH"])


def _apt(command: list[str], cwd: Path | None = None) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
            subprocess.run(["apt-get", "update", "-qq"], capture_output=True, env=environment, timeout=300, check=False)
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


def _unpacked() -> Path | None:
    images = sorted(CACHE.glob("*/boot/vmlinuz-*"))
    return images[-1] if images else None


def _unpack() -> Path:
    """Get a kernel package and unpack it below the cache, by a rename at the end: half an unpacking is never used."""
    CACHE.mkdir(parents=True, exist_ok=True)
    work = CACHE / f"unpacking.{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        package = _kernel_package()
        _apt(["apt-get", "download", "-q", package], cwd=work)
        (archive,) = work.glob("*.deb")
        subprocess.run(["dpkg", "-x", str(archive), str(work / "root")], check=True, capture_output=True)
        version = next((work / "root" / "lib" / "modules").iterdir()).name
        depmod = _which("depmod", _environment())
        assert depmod is not None, "kernel() has installed kmod"
        subprocess.run([depmod, "-b", str(work / "root"), version], check=True, capture_output=True)
        target = CACHE / version
        if not target.exists():
            (work / "root").rename(target)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(error.cmd)}: {error.stderr.decode(errors='replace').strip()}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = _unpacked()
    assert found is not None
    return found


def _kernel_package() -> str:
    for name in KERNELS:
        done = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            word, _, package = line.strip().partition(": ")
            if word == "Depends" and package.startswith("linux-image-"):
                return package
    raise Unavailable(f"apt knows no kernel package ({', '.join(KERNELS)}): run apt-get update on a Debian machine")


def main(arguments: Sequence[str]) -> int:
    """Run `arguments` in a guest and return its exit code; 77 where there can be no guest."""
    try:
        image = kernel()
    except Unavailable as error:
        print(f"pynet: no virtual machine: {error}", file=sys.stderr)
        return 77
    print(f"pynet: booting {image.name} in a virtual machine, half a minute", file=sys.stderr)
    machine = boot(list(arguments) or ["bash"], image, stdin=None, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        return _relayed(machine)
    finally:
        stop(machine)


def _relayed(machine: subprocess.Popen[bytes]) -> int:
    """Print what the command in the guest prints, without the kernel's own words; return its exit code."""
    assert machine.stdout is not None
    has_begun = False
    console = []
    for line in machine.stdout:
        if not has_begun:
            console.append(line)
            has_begun = line.startswith(READY)
        elif line.startswith(EXIT):
            return int(line[len(EXIT) :])
        else:
            sys.stdout.buffer.write(line.replace(b"\r\n", b"\n"))
            sys.stdout.buffer.flush()
    sys.stderr.buffer.write(b"".join(console[-30:]))
    print("pynet: the virtual machine ended before its command", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
