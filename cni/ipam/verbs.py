"""`pynet-ipam`: the verbs of an IPAM plugin, called in process by `pynet-cni` or as an executable by other plugins."""

from __future__ import annotations

import ipaddress
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from cni import naming, netconf, results, spec
from cni.context import Context
from cni.database import Damaged
from cni.ipam import allocator, hostlocal, ranges
from cni.ipam.store import Allotment, Held, Owner, Store
from pynet.kernel import netlink, netns, rtnl

TYPE = ranges.TYPE
TELLING_TYPES = ("pynet-cni", "bridge")
"""Main plugins whose running pods are all on the bridge that the configuration names."""
T = TypeVar("T")
Key = tuple[str, str]
"""Container id and interface of an attachment."""

_RESOLVER_BYTES = 1 << 20
_LINGER_SECONDS = 2.0
"""How long the kernel may take to remove the links of a namespace that is gone before its addresses stay taken."""


def add(request: spec.Request, context: Context, pod_netns: int = -1) -> results.Result:
    """Reserve one address of every range set; return the result without interfaces. Raise `CniError`."""
    conf = parse(request)
    dns = resolver(conf.resolv_conf)
    store = _store(request, context)
    owner = _owner(request, context, pod_netns)

    def reserve() -> list[Allotment]:
        return store.reserve(conf, owner, conf.requested, context.now(), gone_of(context))

    try:
        allotments = repaired(request, store, reserve)
    except spec.CniError as error:
        if error.code != spec.TRY_LATER or not _await_links(store):
            raise
        allotments = reserve()
    ips = tuple(
        results.Ip(f"{one.address}/{one.range.prefix}", ranges.shown(one.range.gateway, one.range.family))
        for one in allotments
    )
    return results.Result(ips=ips, routes=conf.routes, dns=dns)


def delete(request: spec.Request, context: Context) -> list[Held]:
    """Release what the attachment holds; return it."""
    store = _store(request, context)
    released = repaired(request, store, lambda: store.release(request.container, request.ifname, context.now()))
    if not released or not all(held.owner.boot for held in released):  # another plugin may have given them out
        hostlocal.forget(hostlocal.folder(request.config), lambda one: one.is_of(request.container, request.ifname))
    return released


def held(request: spec.Request, context: Context) -> list[str]:
    """Return the addresses that the attachment holds."""
    store = _store(request, context)
    found = repaired(request, store, lambda: store.held(request.container, request.ifname))
    return [one.address for one in found]


def confirmed(request: spec.Request, context: Context) -> bool:
    """Say whether the attachment's reservation is still written where it was; cheap while the file is the same."""
    store = _store(request, context)
    return store.unchanged() or bool(held(request, context))


def check(request: spec.Request, context: Context) -> None:
    """Raise `CniError` unless the attachment holds exactly the addresses that prevResult, if given, lists."""
    conf = parse(request)
    store = _store(request, context)
    reserved = repaired(request, store, lambda: store.held(request.container, request.ifname))
    held = {one.address for one in reserved}
    if not held:
        raise spec.CniError(
            spec.FAILED, f"IPAM: no address is reserved for {request.container}/{request.ifname} in {conf.network}"
        )
    if request.config.get("prevResult") is not None:
        previous = results.parse_result(request.config["prevResult"], request.version)
        ours = {ip.address.partition("/")[0] for ip in previous.ips if _in_sets(ip.address, conf.sets)}
        for missing in sorted(ours - held):
            raise spec.CniError(
                spec.FAILED, f"IPAM: address {missing} is not reserved for {request.container}/{request.ifname}"
            )


def status(request: spec.Request, context: Context) -> None:
    """Raise `CniError` 50 when a range set has no address left, after reclaiming what dead pods hold."""
    conf = parse(request)
    resolver(conf.resolv_conf)
    store = _store(request, context)
    if min(_free(request, store, conf)) == 0:
        _await_links(store)
        store.release_where(gone_of(context), context.now())
    free = _free(request, store, conf)
    if min(free) == 0:
        raise spec.CniError(
            spec.CANNOT_ADD, f"no IP addresses available in network {conf.network}", _counted(conf, free)
        )


def free_addresses(request: spec.Request, context: Context) -> str:
    """Return how many addresses of each range set are free, as text. Raise `CniError`."""
    conf = parse(request)
    return _counted(conf, _free(request, _store(request, context), conf))


def _free(request: spec.Request, store: Store, conf: ranges.IpamConf) -> list[int]:
    return repaired(request, store, lambda: [store.free(one) for one in conf.sets])


def _counted(conf: ranges.IpamConf, free: list[int]) -> str:
    return "; ".join(
        f"{shown(one)}: {count} of {allocator.capacity(one)} addresses free"
        for one, count in zip(conf.sets, free, strict=True)
    )


def collect(request: spec.Request, context: Context, valid: set[Key] | None) -> list[Held]:
    """Release what is held by attachments that are not `valid` (None: none are known), or whose pod is gone."""
    store, over = _store(request, context), _over(context, valid)
    released = repaired(request, store, lambda: store.release_where(over, context.now()))
    inherited = {held.owner[:2] for held in released if not held.owner.boot}
    if inherited:
        folder = hostlocal.folder(request.config)
        hostlocal.forget(folder, lambda one: any(one.is_of(*owner) for owner in inherited))
    return released


def inherited(request: spec.Request, context: Context, valid: set[Key] | None) -> dict[Key, list[str]]:
    """Return the addresses that `collect` is going to release and another plugin gave out, by attachment."""
    store, over = _store(request, context), _over(context, valid)
    found: dict[Key, list[str]] = {}
    for held in repaired(request, store, store.all):
        if held.owner.container and not held.owner.boot and over(held.owner):
            found.setdefault((held.owner.container, held.owner.ifname), []).append(held.address)
    return found


def _over(context: Context, valid: set[Key] | None) -> Callable[[Owner], bool]:
    gone = gone_of(context)

    def over(owner: Owner) -> bool:
        if valid is not None and owner.container:
            return (owner.container, owner.ifname) not in valid
        return gone(owner)

    return over


def parse(request: spec.Request) -> ranges.IpamConf:
    """Return the request's IPAM configuration. Raise `CniError`."""
    spec.known_arguments(request.args, netconf.KNOWN_ARGS)
    return ranges.parse(request.config, request.args, request.version, netconf.state_dir(request.config))


def shown(range_set: ranges.RangeSet) -> str:
    """Return a range set as text."""
    return ", ".join(f"{ranges.shown(e.first, e.family)}-{ranges.shown(e.last, e.family)}" for e in range_set)


def repaired(request: spec.Request, store: Store, work: Callable[[], T]) -> T:
    """Do `work`; a damaged database is rebuilt from the links of running pods and tried once more. Raise `CniError`.

    Only under a main plugin whose pods are on a bridge: the kernel tells every address in use. Others' do not; but what
    was last written before the machine started, holds no address of a running pod.
    """
    try:
        return work()
    except Damaged as damage:
        if request.config.get("type") not in TELLING_TYPES and not store.of_earlier_boot():
            raise spec.CniError(
                spec.IO_FAILURE, f"IPAM: {damage}",
                "it cannot be rebuilt under this main plugin: remove the file when no pod of this network runs",
            ) from None  # fmt: skip
        store.rebuild()
        return work()


def gone_of(context: Context) -> Callable[[Owner], bool]:
    """Return what says whether an owner is no more.

    That is one of another boot, or one whose namespace is not at its path any more and whose host link, which lives as
    long as the namespace, does not exist either. Of a pod that was found running only its host link is known.
    """

    def gone(owner: Owner) -> bool:
        if owner.boot and owner.boot != context.boot:
            return True
        if not owner.inode and owner.netns and "/" not in owner.netns:
            return not rtnl.index_of(owner.netns)
        return _has_left(owner) and not _has_link(owner)

    return gone


def _has_left(owner: Owner) -> bool:
    return bool(owner.inode) and netns.path_identity(owner.netns) != (owner.device, owner.inode)


def _has_link(owner: Owner) -> bool:
    with netlink.Socket() as host:
        return rtnl.link_named(host, naming.host_link(owner.container, owner.ifname)) is not None


def _await_links(store: Store) -> bool:
    """Wait for the kernel to remove the links of pods that have left their paths; say whether there are such pods."""
    left = [held.owner for held in store.all() if _has_left(held.owner)]
    deadline = time.monotonic() + _LINGER_SECONDS
    while any(_has_link(owner) for owner in left) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(left)


def resolver(path: str) -> results.Dns:
    """Return what a resolv.conf says. Raise `CniError`."""
    if not path:
        return results.Dns()
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            content = file.read(_RESOLVER_BYTES) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise spec.CniError(spec.IO_FAILURE, f"field ipam.resolvConf: {path}: {said}") from None
    if content is None:
        raise spec.CniError(spec.IO_FAILURE, f"field ipam.resolvConf: {path} is not a file")
    return resolver_of(content.decode(errors="replace").splitlines())


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would wait for its writer


def resolver_of(lines: Iterable[str]) -> results.Dns:
    """Return what the lines of a resolv.conf say; of domain and search, the last line counts."""
    nameservers: list[str] = []
    options: list[str] = []
    search: list[str] = []
    domain = ""
    for line in lines:
        words = line.split()
        if len(words) < 2 or line[0] in "#;":
            continue
        if words[0] == "nameserver":
            nameservers.append(words[1])
        elif words[0] == "domain":
            domain = words[1]
        elif words[0] == "search":
            search += words[1:]
        elif words[0] == "options":
            options += words[1:]
    return results.Dns(tuple(nameservers), domain, tuple(search), tuple(options))


def _store(request: spec.Request, context: Context) -> Store:
    """Return the store, found even when the ranges of the configuration are broken by now."""
    ipam = request.config.get("ipam")
    data_dir = ipam.get("dataDir") if isinstance(ipam, Mapping) else None
    if not isinstance(data_dir, str) or not data_dir.startswith("/"):
        data_dir = f"{netconf.state_dir(request.config)}/ipam"
    kind, bridge = request.config.get("type"), request.config.get("bridge") or "cni0"
    bridge = bridge if kind in TELLING_TYPES and isinstance(bridge, str) else ""
    return context.store(data_dir, request.network, bridge, hostlocal.folder(request.config))


def _owner(request: spec.Request, context: Context, pod_netns: int) -> Owner:
    identity = netns.identity(pod_netns) if pod_netns >= 0 else netns.path_identity(request.netns)
    device, inode = identity or (0, 0)
    return Owner(request.container, request.ifname, context.boot, request.netns, device, inode, context.now())


def _in_sets(address: str, sets: tuple[ranges.RangeSet, ...]) -> bool:
    number = ipaddress.ip_interface(address).ip
    return any(e.family == number.version and e.first <= int(number) <= e.last for one in sets for e in one)
