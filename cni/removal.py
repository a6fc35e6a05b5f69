"""Undoing an attachment: DEL, GC, and what an ADD finds left over. Every step is tried, whatever came before."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from cni import ctl, delegate, journal, naming, netconf, predecessor, ruleset, spec, vlan, wiring
from cni.context import Context
from cni.ctl import step
from cni.ipam import verbs as ipam
from cni.spec import CniError, Request
from pynet.kernel import ctflush, netlink, netns, rtnl


class Attachment(NamedTuple):
    """Whose leavings are to be removed."""

    network: str
    container: str
    ifname: str

    @property
    def tag(self) -> str:
        """What its elements' comments say."""
        return ruleset.owner(self.network, self.container, self.ifname)


T = TypeVar("T")


class Failures:
    """Collects what goes wrong, so that the next step is tried all the same."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Exception]] = []

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """Do `work` and return what it returns; a failure is kept under the name `what`."""
        try:
            return work()
        except Exception as error:
            self.found.append((what, error))
            return None

    def report(self, verb: str) -> None:
        """Raise one `CniError` that tells all failures."""
        if not self.found:
            return
        code = next((error.code for _, error in self.found if isinstance(error, CniError)), spec.FAILED)
        raise CniError(code, f"{verb}: " + "; ".join(f"{what}: {ctl.said(error)}" for what, error in self.found))


def delete(request: Request, environment: Mapping[str, str], context: Context, pod_netns: int) -> str:
    """Remove all that the attachment has; what is not there any more does not matter."""
    who = Attachment(request.network, request.container, request.ifname)
    state_dir = netconf.state_dir(request.config)
    book = context.journal(state_dir)
    failures = Failures()
    with ctl.turn(request, state_dir), ctl.pod(request, pod_netns) as pod, netlink.Socket() as host:
        record = failures.attempt("record", lambda: book.read(request.container, request.ifname))
        links = _has_own_links(who, record, host)
        if record is not None and pod >= 0 and netns.identity(pod) != (record.device, record.inode):
            pod = -1  # another pod's, at the path where this one's was
        if record is not None and record.network != request.network:
            record = None  # another network's attachment under the same names is not ours to remove
        step("del-start")
        addresses = _addresses(request, record, context, failures)
        before = predecessor.addresses(request) if record is None else []
        if before:
            predecessor.clear(*who, before, host, failures.attempt)
            addresses = tuple(dict.fromkeys((*addresses, *before)))
        bridge = record.bridge if record else _bridge(request)
        iptables = record.iptables if record else _uses_iptables(request)
        clear(who, record, addresses, bridge, host, book, context, failures, pod, links=links, iptables=iptables)
        failures.attempt("IPAM", lambda: _release(request, environment, context))
        step("del-ipam")
        finish(record, book, host, failures)
    failures.report("DEL")
    return ""


def _has_own_links(who: Attachment, record: journal.Record | None, host: netlink.Socket) -> bool:
    """Say whether the links under an attachment's names are its own, not another network's: links know no network."""
    if record is not None:
        return record.network == who.network
    link = rtnl.link_named(host, naming.host_link(who.container, who.ifname))
    mark = naming.mark(link.alias) if link is not None else None
    return mark is None or mark.network == who.network


def clear(
    who: Attachment, record: journal.Record | None, addresses: tuple[str, ...], bridge: str,
    host: netlink.Socket, book: journal.Journal, context: Context, failures: Failures, pod: int = -1,
    *, links: bool = True, iptables: bool = False,
) -> None:  # fmt: skip
    """Remove links (if they are its own) and rules of an attachment, and what the kernel remembers of its addresses."""
    name = naming.host_link(who.container, who.ifname)
    if links:
        failures.attempt("veth", lambda: _delete_link(host, name, pod, who, context))
    step("del-link")
    if links and (record is None or record.ifb):
        ifb = naming.ifb_link(who.container, who.ifname)
        failures.attempt("intermediate device", lambda: delete_named(host, ifb, context))
    step("del-ifb")
    if record is None:
        failures.attempt("nftables", lambda: _remove_owned({who.tag}, book))
    else:
        failures.attempt("nftables", lambda: ruleset.remove(list(record.elements), who.tag))
    step("del-elements")
    if iptables:
        from cni import iptmasq  # only who asked for it waits for its imports

        failures.attempt("iptables", lambda: iptmasq.remove(who.tag))
    step("del-rules")
    failures.attempt("connections", lambda: flush(host, bridge, addresses, record.udp_ports if record else ()))
    step("del-flush")


def finish(record: journal.Record | None, book: journal.Journal, host: netlink.Socket, failures: Failures) -> None:
    """Remove the bridge of an ADD that did not get to its end, then the record: it is the last to go."""
    if record is None:
        return
    if record.made_bridge:
        failures.attempt("bridge", lambda: remove_bridge(host, record.bridge))
    step("del-bridge")
    if not failures.found:
        failures.attempt("record", lambda: book.forget(record.container, record.ifname, ruleset.remove_tables))
    step("del-end")


def flush(
    host: netlink.Socket, bridge: str, addresses: tuple[str, ...], udp_ports: tuple[tuple[int, int], ...]
) -> None:
    """Forget connections and neighbours of addresses, and flows to UDP host ports, that change hands."""
    packed = [ipaddress.ip_address(address).packed for address in addresses]
    ctflush.flush(packed, [(port, 2 if family == 4 else 10) for port, family in udp_ports])
    at = rtnl.index_of(bridge) if packed else 0
    if at:
        host.batch([rtnl.neighbour_request(at, one, add=False) for one in packed])


def remove_bridge(host: netlink.Socket, name: str) -> None:
    """Delete a bridge that nothing is attached to but gateways of its VLANs, and those."""
    bridge = rtnl.link_named(host, name)
    if bridge is None or bridge.kind != "bridge":
        return
    ports = rtnl.links(host, master=bridge.ifindex)
    if all(vlan.is_gateway_port(port, name) for port in ports):
        for link in (*ports, bridge):
            rtnl.delete_link(host, link.ifindex)


def gone(record: journal.Record, host: netlink.Socket) -> bool:
    """Say whether an attachment's pod is no more: its namespace is not at its path, its host link does not exist."""
    if netns.path_identity(record.netns) == (record.device, record.inode):
        return False
    return rtnl.link_named(host, naming.host_link(record.container, record.ifname)) is None


def purge(record: journal.Record, book: journal.Journal, host: netlink.Socket, context: Context) -> list[str]:
    """Remove all of an attachment but its IPAM reservation; return what went wrong."""
    failures = Failures()
    who = Attachment(record.network, record.container, record.ifname)
    clear(who, record, record.addresses, record.bridge, host, book, context, failures, iptables=record.iptables)
    finish(record, book, host, failures)
    return [f"{record.container}/{record.ifname}: {what}: {ctl.said(error)}" for what, error in failures.found]


# --- GC


def collect(request: Request, environment: Mapping[str, str], context: Context, pod_netns: int) -> str:
    """Free what belongs to attachments of this network that are not valid (any more); tell all failures at the end."""
    del pod_netns
    valid = valid_attachments(request.config)
    book = context.journal(netconf.state_dir(request.config))
    failures = Failures()
    with netlink.Socket() as host:
        records = {(record.container, record.ifname): record for record in book.all(request.network)}

        def over(key: tuple[str, str]) -> bool:
            if valid is not None:
                return key not in valid
            return key in records and gone(records[key], host)

        for key in sorted(records.keys() | _marked(host, request.network)):
            if not over(key):
                continue
            record = records.get(key) or _unrecorded(request, key)
            failures.attempt("/".join(key), lambda record=record: _purge(record, book, host, context))  # type: ignore[misc]
        if valid is not None:
            spared = {ruleset.owner(request.network, *key) for key in valid}
            failures.attempt("nftables", lambda: _remove_strays(request.network, spared, book))
            if _uses_iptables(request):
                from cni import iptmasq  # only who asked for it waits for its imports

                failures.attempt("iptables", lambda: iptmasq.remove_strays(request.network, spared))
    kind = ipam_type(request.config)
    if kind == ipam.TYPE:
        failures.attempt("IPAM", lambda: _collect_inherited(request, context, valid))
        failures.attempt("IPAM", lambda: ipam.collect(request, context, valid))
    elif kind:
        failures.attempt("IPAM", lambda: delegate.run("GC", request, kind, environment))
    failures.report("GC")
    return ""


def _collect_inherited(request: Request, context: Context, valid: set[tuple[str, str]] | None) -> None:
    """Remove what the reference plugins left of attachments whose addresses are about to be released."""
    failures = Failures()
    with netlink.Socket() as host:
        for key, held in ipam.inherited(request, context, valid).items():
            predecessor.clear(request.network, *key, held, host, failures.attempt)
            flush(host, _bridge(request), tuple(held), ())
    failures.report("what another plugin left")


def valid_attachments(config: Mapping[str, object]) -> set[tuple[str, str]] | None:
    """Return the attachments that GC must spare; None when the list is absent. Raise `CniError`."""
    for key in ("cni.dev/valid-attachments", "cni.dev/attachments"):
        raw = config.get(key)
        if raw is None:
            continue
        if not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw):
            raise CniError(spec.BAD_CONFIG, f"field {key} is not a list of objects")
        found = [(entry.get("containerID"), entry.get("ifname")) for entry in raw]
        for number, names in enumerate(found):  # who is misread here would be removed
            if not all(isinstance(name, str) and name for name in names):
                raise CniError(spec.BAD_CONFIG, f"field {key}[{number}]: expected containerID and ifname as text")
        return {(str(container), str(ifname)) for container, ifname in found}
    return None


def ipam_type(config: Mapping[str, object]) -> str:
    """Return the IPAM plugin's type, whatever else is wrong with the configuration; empty without one."""
    section = config.get("ipam")
    kind = section.get("type") if isinstance(section, dict) else ""
    return kind if isinstance(kind, str) else ""


def _purge(record: journal.Record, book: journal.Journal, host: netlink.Socket, context: Context) -> None:
    failed = purge(record, book, host, context)
    if failed:
        raise CniError(spec.FAILED, "; ".join(failed))


def _marked(host: netlink.Socket, network: str) -> set[tuple[str, str]]:
    """Return the attachments that links of this network tell by their alias."""
    marks = [naming.mark(link.alias) for kind in ("veth", "ifb") for link in rtnl.links(host, kind=kind)]
    return {(mark.container, mark.ifname) for mark in marks if mark is not None and mark.network == network}


def _remove_owned(tags: set[str], book: journal.Journal) -> None:
    """Remove elements by their owners' tags, and the tables once they are of no use to anybody."""
    if ruleset.remove_owned(tags):
        book.when_unused(ruleset.remove_tables)


def _remove_strays(network: str, spared: set[str], book: journal.Journal) -> None:
    """Remove elements of this network whose owner is not spared: of attachments of which nothing else is left."""
    tags = {element.owner for element in ruleset.owned() if element.owner.startswith(f"{network} ")}
    _remove_owned(tags - spared, book)


def _unrecorded(request: Request, key: tuple[str, str]) -> journal.Record:
    """Return what an attachment may have whose record is lost."""
    return journal.Record(*key, request.network, ifb=True, bridge=_bridge(request), iptables=_uses_iptables(request))


def _uses_iptables(request: Request) -> bool:
    return request.config.get("ipMasqBackend") == "iptables"


def _bridge(request: Request) -> str:
    return str(request.config.get("bridge") or "cni0")


def _addresses(
    request: Request, record: journal.Record | None, context: Context, failures: Failures
) -> tuple[str, ...]:
    """Return the attachment's addresses, from its record or from what IPAM has reserved."""
    if record is not None:
        return record.addresses
    found: list[str] = []
    if ipam_type(request.config) == ipam.TYPE:
        failures.attempt("IPAM", lambda: found.extend(ipam.held(request, context)))
    return tuple(found)


def _delete_link(host: netlink.Socket, name: str, pod: int, who: Attachment, context: Context) -> None:
    """Delete a link of the host; where it is missing, the pod's end of whatever made that."""
    ifindex = rtnl.index_of(name)
    if ifindex:
        context.delete_link(host, ifindex)
    elif pod >= 0:
        wiring.delete_in_pod(host, pod, who.container, who.ifname)


def delete_named(host: netlink.Socket, name: str, context: Context) -> None:
    """Delete a link of the host, if it is there."""
    ifindex = rtnl.index_of(name)
    if ifindex:
        context.delete_link(host, ifindex)


def _release(request: Request, environment: Mapping[str, str], context: Context) -> None:
    kind = ipam_type(request.config)
    if kind == ipam.TYPE:
        ipam.delete(request, context)
    elif kind:
        delegate.run("DEL", request, kind, environment)
