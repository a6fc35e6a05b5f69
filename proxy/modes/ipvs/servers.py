"""The kernel's virtual servers as this mode uses them: read, changed step by step, and left to drain."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from proxy.modes.ipvs.drains import Drains
from proxy.modes.ipvs.layout import Wanted
from proxy.modes.ipvs.steps import Do, Live, Step, draining
from pynet.daemon import logs
from pynet.ipvs import Service, ServiceId, Timeouts
from pynet.kernel.ipvs import Ipvs, IpvsMissing
from pynet.kernel.netlink import Message, NetlinkError

log = logs.get(__name__)
# errors that mean: it is so already
_SETTLED = {
    Do.ADD: (errno.EEXIST,),
    Do.DELETE_SERVICE: (errno.ESRCH, errno.ENOENT),
    Do.DELETE: (errno.ESRCH, errno.ENOENT),
}


class Servers:
    """Virtual servers of the namespace in which they are first asked for. Raises `NetlinkError` and `IpvsMissing`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kernel: Ipvs | None = None
        self._lacking: dict[str, bool] = {}
        self._drains = Drains()

    def is_possible(self) -> bool:
        """Whether the kernel has IPVS."""
        try:
            self._ipvs()
        except IpvsMissing:
            return False
        return True

    def present(self) -> dict[ServiceId, Service]:
        """Return all virtual servers, foreign ones too."""
        return self._ipvs().services()

    def are_fewer(self, version: int, wanted: int) -> bool:
        """Whether there are fewer of an IP version than `wanted`."""
        readings = (self._ipvs().glance, self._ipvs().services)  # the second only where the first finds too few
        return all(sum(name.version == version for name in read()) < wanted for read in readings)

    def set_timeouts(self, timeouts: Timeouts) -> None:
        """Set the idle times that are not 0."""
        self._ipvs().set_timeouts(timeouts)

    def unknown(self, names: Iterable[str]) -> set[str]:
        """Return those of these schedulers that the kernel was not asked for yet."""
        return set(names) - self._lacking.keys()

    def lacking(self, names: Iterable[str]) -> frozenset[str]:
        """Return which of these schedulers the kernel has not; it is asked once for each."""
        names = set(names)
        new = sorted(self.unknown(names))
        missing = self._ipvs().lacking(new)
        self._lacking.update((name, name in missing) for name in new)
        return frozenset(name for name in names if self._lacking[name])

    def live(self, ours: Mapping[ServiceId, Service], want: Mapping[ServiceId, Wanted]) -> dict[ServiceId, Live]:
        """Return our virtual servers as the kernel has them; an endpoint found without new connections drains on."""
        live = {}
        for name, service in ours.items():
            destinations = self._ipvs().destinations(name) if name in want else {}
            live[name] = Live(service, {one: state.weight for one, state in destinations.items()})
        for name, gone in draining(live, want).items():
            for one in gone:
                seconds = want[name].seconds_of(one) if name in want else 0.0
                if seconds and not live[name].destinations[one]:
                    self._drains.begin(name, one, self._clock() + seconds)
        return live

    def written(self, want: Mapping[ServiceId, Wanted]) -> dict[ServiceId, Live]:
        """Return the virtual servers as they are once `want` is written."""
        found = {}
        for name, wanted in want.items():
            destinations = wanted.destinations | dict.fromkeys(self._drains.of(name), 0)
            if destinations:
                found[name] = Live(wanted.service, destinations)
        return found

    def take(self, todo: Sequence[Step]) -> tuple[set[ServiceId], list[tuple[Step, NetlinkError]]]:
        """Take the steps, new virtual servers first; return those that were there, as somebody else's, and failures.

        Where a new one is somebody else's, the other steps are not taken.
        """
        new = [step for step in todo if step.do is Do.ADD_SERVICE]
        foreign = set()
        failed: list[tuple[Step, NetlinkError]] = []
        for step, error in zip(new, self._send(new), strict=True):
            if error is not None and error.errno == errno.EEXIST:
                foreign.add(step.service)
            elif error is not None:
                failed.append((step, error))
        if foreign:
            return foreign, failed
        rest = [step for step in todo if step.do is not Do.ADD_SERVICE]
        for step, error in zip(rest, self._send(rest), strict=True):
            if error is not None and error.errno not in _SETTLED.get(step.do, ()):
                failed.append((step, error))
            else:
                self._note_drain(step)
        return foreign, failed

    def remove(self, names: Collection[ServiceId]) -> None:
        """Remove virtual servers; nothing drains any more."""
        self._send([Step(Do.DELETE_SERVICE, name) for name in names])
        self._drains = Drains()

    def end_drains(self, has_endpoints: Callable[[ServiceId], bool]) -> bool:
        """Remove endpoints that have drained, and virtual servers that were there only for them. True: it failed."""
        due = self._drains.due(self._ipvs().destinations, self._clock())
        todo = [Step(Do.DELETE, service, None, destination) for service, destination in due]
        for step in todo:
            self._note_drain(step)
        servers = sorted({service for service, _ in due})
        todo += (Step(Do.DELETE_SERVICE, one) for one in servers if not has_endpoints(one) and not self._drains.of(one))
        if todo:
            log.info("endpoints have drained", extra=logs.fields(count=len(due), servers=len(servers)))
        errors = zip(todo, self._send(todo), strict=True)
        return any(error is not None and error.errno not in _SETTLED[step.do] for step, error in errors)

    def _ipvs(self) -> Ipvs:
        if self._kernel is None:
            self._kernel = Ipvs()
        return self._kernel

    def _note_drain(self, step: Step) -> None:
        if step.do is Do.DELETE_SERVICE:
            self._drains.end(step.service)
        elif step.drain_seconds and step.destination:
            self._drains.begin(step.service, step.destination, self._clock() + step.drain_seconds)
        elif step.destination:
            self._drains.end(step.service, step.destination)

    def _send(self, todo: Sequence[Step]) -> list[NetlinkError | None]:
        return self._ipvs().send([_message(self._ipvs(), step) for step in todo])


def _message(kernel: Ipvs, step: Step) -> Message:
    if step.destination is None:
        if step.settings is None:
            return kernel.delete_service(step.service)
        make = kernel.add_service if step.do is Do.ADD_SERVICE else kernel.set_service
        return make(step.service, step.settings)
    if step.do is Do.DELETE:
        return kernel.delete_destination(step.service, step.destination)
    put = kernel.add_destination if step.do is Do.ADD else kernel.set_destination
    return put(step.service, step.destination, step.weight)
