"""The pytest side of the lane: tests marked `vm` run in one guest, beside the others, and are reported like them.

On the host, the first process that has collected such tests boots one machine for all of them; every process waits for
the reports of its own. In the guest (PYNET_VM=1) they are ordinary tests whose reports are written down for the host.
"""

from __future__ import annotations

import compileall
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vm import machine
from vm.halves import Halves

LIMIT_SECONDS = 1800
GUEST_PROCESSES = 2


def in_guest() -> bool:
    """Tell whether this process runs where tests marked `vm` can run."""
    return bool(os.environ.get("PYNET_VM"))


class Reporter:
    """In the guest: each test's reports, a JSON line each, for the host to read while the tests go on.

    Each process has a file of its own.
    """

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self.write_as(0)

    def write_as(self, number: int) -> None:
        """Write to the file of the process of this number."""
        self._out = (self._folder / f"reports-{number}").open("a", encoding="utf-8", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._out.write(json.dumps(data, default=str) + "\n")


class Lane:
    """On the host: one machine for all tests marked `vm` of this run, and the reports that come from it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        worker = getattr(config, "workerinput", None)
        self._worker: str = worker["workerid"] if worker else ""
        run = worker["testrunuid"] if worker else f"pid{os.getpid()}"
        self._share = machine.CACHE / f"run-{run}"
        self._machine: subprocess.Popen[bytes] | None = None
        self._read: dict[Path, int] = {}
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._deadline = 0.0
        self._reading = -1

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.get_closest_marker("vm") is not None)  # last: the guest runs meanwhile

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = [item.nodeid for item in session.items if item.get_closest_marker("vm")]
        if not names or session.config.option.collectonly:
            return
        self._share.mkdir(parents=True, exist_ok=True)
        self._reading = os.open(self._share, os.O_RDONLY)
        fcntl.flock(self._reading, fcntl.LOCK_SH)
        if self._worker not in ("", "gw0"):
            return
        sweep()
        try:
            image = machine.kernel()
        except machine.Unavailable as error:
            self._write("unavailable", str(error))
            return
        self._write("arguments", "\n".join(names) + "\n")
        self._compile()
        with (self._share / "console").open("ab") as console:  # ab: qemu opens it several times
            self._machine = machine.boot(
                [
                    "env", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1",  # they take long to import
                    "python", "-m", "pytest", f"@{self._share}/arguments",
                    "-p", "no:cacheprovider", "-q", "--color=no", "--durations=15",
                ],
                image, share=self._share, stdout=console, stderr=console,
            )  # fmt: skip
        self._write("started", str(self._machine.pid))

    def _compile(self) -> None:
        """Have all that the guest imports compiled: it cannot keep what it compiles, and takes ten times as long."""
        for package in ("pynet", "cni", "proxy"):
            compileall.compile_dir(machine.ROOT / package, quiet=2)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        collecting = ["-m", "pytest", f"@{self._share}/arguments", "--collect-only", "-q", "-p", "no:cacheprovider"]
        subprocess.run(
            [sys.executable, *collecting], cwd=machine.ROOT, env=environment, capture_output=True, check=False
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if not item.get_closest_marker("vm"):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports_of(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self._machine is not None:
            # other workers may wait for reports still: the guest ends by itself when the last test has
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._machine.wait(10 if exitstatus == pytest.ExitCode.INTERRUPTED else LIMIT_SECONDS)
            machine.stop(self._machine)
        if self._reading >= 0:
            os.close(self._reading)
        if not self._worker:
            sweep()

    def _write(self, name: str, text: str) -> None:
        (self._share / f"{name}.part").write_text(text)
        (self._share / f"{name}.part").rename(self._share / name)

    def _reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        self._deadline = self._deadline or time.monotonic() + LIMIT_SECONDS
        while True:
            ended = self._ended()
            self._collect()
            reports = self._reports.get(item.nodeid, [])
            if any(report.when == "teardown" for report in reports):
                return reports
            if (reason := self._unavailable()) is not None:
                return [_report(item, "skipped", f"no virtual machine: {reason}")]
            if ended or time.monotonic() > self._deadline:
                what = "ended" if ended else f"has not answered in {LIMIT_SECONDS} s"
                return [_report(item, "failed", f"the virtual machine {what} without a report:\n{self._console()}")]
            time.sleep(0.2)

    def _collect(self) -> None:
        for path in self._share.glob("reports-*"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                raw: dict[str, Any] = json.loads(line)
                report = self._config.hook.pytest_report_from_serializable(config=self._config, data=raw)
                self._reports.setdefault(report.nodeid, []).append(report)

    def _ended(self) -> bool:
        """Tell whether the machine is gone; another worker's is looked up by its process id."""
        if self._machine is not None:
            return self._machine.poll() is not None
        return (pid := _started(self._share)) is not None and not _runs(pid)

    def _unavailable(self) -> str | None:
        try:
            return (self._share / "unavailable").read_text()
        except FileNotFoundError:
            return None

    def _console(self) -> str:
        try:
            return (self._share / "console").read_text(errors="replace")[-6000:]
        except FileNotFoundError:
            return "(no console)"


def sweep() -> None:
    """Remove what runs left whose machine has ended: by the process that is the last to look, or the next run."""
    for share in machine.CACHE.glob("run-*"):
        pid = _started(share)
        if pid is not None and not _runs(pid) and not _is_read(share):
            with contextlib.suppress(FileNotFoundError):
                os.replace(share / "console", machine.CACHE / "last-console")
            shutil.rmtree(share, ignore_errors=True)


def _is_read(share: Path) -> bool:
    """Tell whether a process still waits for reports from there: another run, perhaps, may sweep before it has all."""
    fd = os.open(share, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _started(share: Path) -> int | None:
    """Return the process id of a run's machine; None where it has not been started."""
    try:
        return int((share / "started").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _report(item: pytest.Item, outcome: str, text: str) -> pytest.TestReport:
    path, line, _ = item.location
    longrepr: Any = (path, (line or 0) + 1, f"Skipped: {text}") if outcome == "skipped" else text
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, longrepr, "call")  # type: ignore[arg-type]


def install(config: pytest.Config) -> None:
    """Run or forward the tests marked `vm`, as this process is in the guest or not."""
    if in_guest():
        reports = os.environ.get("PYNET_VM_REPORTS")
        if reports:
            reporter = Reporter(config, Path(reports))
            config.pluginmanager.register(reporter)
            config.pluginmanager.register(Halves(GUEST_PROCESSES, reporter.write_as))
    else:
        config.pluginmanager.register(Lane(config))
