"""The parts of the daemon between a source and the kernel: engine, its runner, and those who follow what is written.

Wiring only. Knows no command line; whoever calls has the source, the mode and the servers.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple, Protocol

from proxy.config import Settings
from proxy.engine import Engine
from proxy.flows import Cleaner
from proxy.health import Health
from proxy.holding import Holder
from proxy.metrics import Metrics
from proxy.modes import Mode, registry
from proxy.plan import Family
from proxy.refusals import CountsDrops, Refusals
from proxy.service_health import ServiceHealth
from proxy.snapshot import StateFile
from pynet.daemon import lifecycle, logs
from pynet.daemon.loop import BoundedRunner
from pynet.sources.events import Events

log = logs.get(__name__)
_TICK_SECONDS = 1.0
_RETRY_SECONDS = 1.0


class Closes(Protocol):
    """What is to be closed at the end."""

    def close(self) -> None:
        """Give back what it holds."""


class Parts(NamedTuple):
    """The parts put together. `open`: those that hold sockets."""

    engine: Engine
    runner: BoundedRunner
    health: Health
    metrics: Metrics
    open: tuple[Closes, ...]


def assembled(
    config: Path | None, settings: Settings, kinds: frozenset[str], mode: Mode, events: Events, stop: threading.Event
) -> Parts:
    """Return the parts, none of which runs yet. `kinds`: what the source delivers; `config`: the file to watch."""
    metrics = Metrics()
    families = families_of_host()
    engine: Engine
    health = Health(families, settings.sync_seconds, lambda: engine.cluster.node)
    runner = BoundedRunner(
        lambda: engine.work(),
        min_interval=settings.min_sync_seconds,
        max_interval=_TICK_SECONDS,
        retry=_RETRY_SECONDS,
    )
    service_health = ServiceHealth(settings.node_name, health.is_healthy, events)
    holder = Holder(events)
    engine = Engine(
        settings,
        mode,
        families,
        kinds,
        metrics,
        request=runner.request,
        events=events,
        health=health,
        followers=[
            Cleaner(metrics),
            service_health,
            Watchdog(),
            *([holder] if settings.hold_node_ports else []),
            *([Refusals(mode, metrics)] if isinstance(mode, CountsDrops) else []),
            *([ConfigWatch(config, stop)] if config is not None else []),
        ],
        snapshots=StateFile(Path(settings.state_file)) if settings.state_file else None,
        first_written=lambda: stand_alone(settings, mode, len(engine.cluster.services)),
    )
    return Parts(engine, runner, health, metrics, (service_health, holder))


def stand_alone(settings: Settings, mode: Mode, services: int) -> None:
    """Take the last step of a start, now that the mode's rules stand: the others' go, and who waits for us is told."""
    log.info("Services are in the kernel", extra=logs.fields(mode=mode.name, services=services))
    remove_other_modes(settings, mode)
    lifecycle.notify("READY=1")


def remove_other_modes(settings: Settings, current: Mode) -> None:
    """Remove what another mode has left, now that the current one's rules stand."""
    if settings.mode == "userspace" and settings.userspace.listen_only:
        return  # without privilege there is nothing that could be removed
    for name in registry.MODES:
        if name == current.name:
            continue
        try:
            registry.made(settings, name).cleanup()
        except Exception as error:  # another mode may not even be possible here, and must not stop this one
            log.debug("nothing to remove", extra=logs.fields(mode=name, error=error))


def families_of_host() -> tuple[Family, ...]:
    """Return the address families that this network namespace has."""
    return (Family.V4, Family.V6) if Path("/proc/self/net/if_inet6").exists() else (Family.V4,)


class ConfigWatch:
    """Ends the daemon when its configuration file changes, so that it is started anew with it (as kube-proxy does)."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        self._path = path
        self._stop = stop
        self._text = path.read_bytes()

    def follow(self, cluster: object, changes: object, services: object) -> None:
        """Nothing follows from a change of objects."""

    def tick(self, now: float) -> None:  # noqa: ARG002
        """Compare the file with what it was; one that cannot be read is on its way to be replaced."""
        try:
            text = self._path.read_bytes()
        except OSError:
            return
        if text != self._text:
            log.warning(
                "the configuration file has changed: ending, to be started anew", extra=logs.fields(file=self._path)
            )
            self._stop.set()


class Watchdog:
    """Tells the service manager that the engine still turns."""

    def follow(self, cluster: object, changes: object, services: object) -> None:
        """Nothing follows from a change."""

    def tick(self, now: float) -> None:  # noqa: ARG002
        """Say so."""
        if lifecycle.watchdog_seconds() is not None:
            lifecycle.notify("WATCHDOG=1")
