"""IPVS through generic netlink: virtual servers, their destinations, timeouts. No policy.

Numbers are those of linux/ip_vs.h. The messages are our own: pyroute2's `update` deletes, and its bulk adds take twenty
times as long. A socket belongs to the network namespace of the thread that opened it.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Sequence

from pynet.ipvs import PERSISTENT, SCHED_FALLBACK, Destination, DestinationId, Service, ServiceId, Timeouts
from pynet.kernel import netlink
from pynet.kernel.netlink import Message, NetlinkError, attr, nest, text, u16, u32

_SETTABLE = PERSISTENT | SCHED_FALLBACK | 0x10 | 0x20 | 0x4

_GENERIC, _CONTROL, _GET_FAMILY = 16, 16, 3
_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST, _SET_CONFIG, _GET_CONFIG = 5, 6, 7, 8, 12, 13
_SERVICE, _DEST, _TIMEOUT_TCP, _TIMEOUT_TCP_FIN, _TIMEOUT_UDP = 1, 2, 4, 5, 6
_MASQUERADE = 0
_PROTOCOLS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP, "SCTP": socket.IPPROTO_SCTP}
_PROTOCOL_NAMES = {number: name for name, number in _PROTOCOLS.items()}
_GLANCES = 20
_CHUNK = 64  # acknowledgements of one datagram must fit the socket's receive buffer


class IpvsMissing(Exception):
    """The kernel has no IPVS, and its module could not be loaded."""


class Ipvs:
    """IPVS of the network namespace in which this was made. Raises `NetlinkError`; not for two threads at once."""

    def __init__(self) -> None:
        self._socket = netlink.Socket(_GENERIC)
        body = struct.pack("=BBH", _GET_FAMILY, 1, 0) + text(2, "IPVS")
        # asking for the family makes the kernel load ip_vs where it can
        reply = self._socket.get(_CONTROL, body, "IPVS", absent=(errno.ENOENT, errno.EPERM))
        if reply is None:
            self._socket.close()
            raise IpvsMissing("the kernel has no IPVS (module ip_vs)")
        self._family = netlink.as_int(netlink.attributes(reply[4:])[1])

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def services(self) -> dict[ServiceId, Service]:
        """Return all virtual servers of the namespace, foreign ones too: glances, until two agree."""
        found = self.glance()
        for _ in range(_GLANCES):
            before, found = found, self.glance()
            if before.keys() == found.keys():
                break
        return found

    def glance(self) -> dict[ServiceId, Service]:
        """Return the virtual servers of one reading: some are missed while other namespaces' go.

        The kernel has one table for all namespaces, and goes on with a list by the number of entries already passed.
        """
        found = {}
        for body in self._socket.dump(self._family, _command(_GET_SERVICE), "list of IPVS services"):
            entry = netlink.attributes(netlink.attributes(body[4:]).get(_SERVICE, b""))
            flags = struct.unpack_from("=I", entry[7])[0]
            persistence = netlink.as_int(entry.get(8)) if flags & PERSISTENT else 0
            found[_service_id(entry)] = Service(netlink.as_text(entry.get(6)), persistence, flags & SCHED_FALLBACK)
        return found

    def destinations(self, service: ServiceId) -> dict[DestinationId, Destination]:
        """Return a virtual server's destinations; none where it is gone."""
        found = {}
        body = _command(_GET_DEST, nest(_SERVICE, *_identity(service)))
        try:
            replies = self._socket.dump(self._family, body, f"destinations of {service}")
        except NetlinkError as error:
            if error.errno == errno.ESRCH:
                return {}
            raise
        for reply in replies:
            entry = netlink.attributes(netlink.attributes(reply[4:]).get(_DEST, b""))
            family = netlink.as_int(entry.get(11), socket.AF_INET6 if service.version == 6 else socket.AF_INET)
            name = DestinationId(_address(family, entry[1]), int.from_bytes(entry[2], "big"))
            found[name] = Destination(
                netlink.as_int(entry.get(4)), netlink.as_int(entry.get(7)), netlink.as_int(entry.get(8))
            )
        return found

    def add_service(self, service: ServiceId, settings: Service) -> Message:
        """Return the request that makes a virtual server."""
        return self._request(_NEW_SERVICE, nest(_SERVICE, *_identity(service), *_settings(service, settings)))

    def set_service(self, service: ServiceId, settings: Service) -> Message:
        """Return the request that changes a virtual server."""
        return self._request(_SET_SERVICE, nest(_SERVICE, *_identity(service), *_settings(service, settings)))

    def delete_service(self, service: ServiceId) -> Message:
        """Return the request that removes a virtual server with its destinations."""
        return self._request(_DEL_SERVICE, nest(_SERVICE, *_identity(service)))

    def add_destination(self, service: ServiceId, name: DestinationId, weight: int) -> Message:
        """Return the request that adds a destination, reached by NAT."""
        return self._request(_NEW_DEST, nest(_SERVICE, *_identity(service)), _destination(name, weight))

    def set_destination(self, service: ServiceId, name: DestinationId, weight: int) -> Message:
        """Return the request that changes a destination's weight; 0: no new connections."""
        return self._request(_SET_DEST, nest(_SERVICE, *_identity(service)), _destination(name, weight))

    def delete_destination(self, service: ServiceId, name: DestinationId) -> Message:
        """Return the request that removes a destination."""
        return self._request(_DEL_DEST, nest(_SERVICE, *_identity(service)), _destination(name, None))

    def send(self, messages: Sequence[Message]) -> list[NetlinkError | None]:
        """Send requests in their order; return each one's error or None. One's failure does not stop the rest."""
        answers: list[NetlinkError | None] = []
        for start in range(0, len(messages), _CHUNK):
            answers += self._socket.batch(messages[start : start + _CHUNK])
        return answers

    def set_timeouts(self, timeouts: Timeouts) -> None:
        """Set the idle times that are not 0, for all virtual servers of the namespace."""
        wanted = ((_TIMEOUT_TCP, timeouts.tcp), (_TIMEOUT_TCP_FIN, timeouts.tcp_fin), (_TIMEOUT_UDP, timeouts.udp))
        have = self.timeouts()
        now = (have.tcp, have.tcp_fin, have.udp)
        values = [u32(kind, value or current) for (kind, value), current in zip(wanted, now, strict=True)]
        if any(value for _, value in wanted):
            self._socket.request(self._family, 0, _command(_SET_CONFIG, *values), "IPVS timeouts")

    def timeouts(self) -> Timeouts:
        """Return the idle times in force."""
        reply = self._socket.get(self._family, _command(_GET_CONFIG), "IPVS timeouts")
        found = netlink.attributes(reply[4:]) if reply else {}
        return Timeouts(*(netlink.as_int(found.get(kind)) for kind in (_TIMEOUT_TCP, _TIMEOUT_TCP_FIN, _TIMEOUT_UDP)))

    def lacking(self, schedulers: Iterable[str]) -> list[str]:
        """Return which schedulers the kernel has not and cannot load: each is tried on a server of no traffic."""
        probe = ServiceId(4, "198.51.100.0", 20000, "UDP")  # TEST-NET-2 (RFC 5737)
        missing = []
        for name in schedulers:
            error = self.send([self.add_service(probe, Service(name))])[0]
            if error is None:
                self.send([self.delete_service(probe)])
            elif error.errno == errno.ENOENT:
                missing.append(name)
            elif error.errno != errno.EEXIST:
                raise error
        return missing

    def _request(self, command: int, *attributes: bytes) -> Message:
        return self._family, 0, _command(command, *attributes)


def _command(command: int, *attributes: bytes) -> bytes:
    return struct.pack("=BBH", command, 1, 0) + b"".join(attributes)


def _identity(service: ServiceId) -> tuple[bytes, ...]:
    family = u16(1, socket.AF_INET6 if service.version == 6 else socket.AF_INET)
    if service.mark:
        return family, u32(5, service.mark)
    port = attr(4, service.port.to_bytes(2, "big"))
    return family, u16(2, _PROTOCOLS[service.protocol]), attr(3, _packed(service.address)), port


def _settings(service: ServiceId, settings: Service) -> tuple[bytes, ...]:
    flags = settings.flags | (PERSISTENT if settings.persistence else 0)
    # IPv4: the netmask that groups clients; IPv6: a prefix length (0 is refused)
    netmask = u32(9, 128) if service.version == 6 else attr(9, b"\xff" * 4)
    return (
        text(6, settings.scheduler),
        attr(7, struct.pack("=II", flags, _SETTABLE)),
        u32(8, settings.persistence),
        netmask,
    )


def _destination(name: DestinationId, weight: int | None) -> bytes:
    family = socket.AF_INET6 if ":" in name.address else socket.AF_INET
    body = [attr(1, _packed(name.address)), attr(2, name.port.to_bytes(2, "big")), u16(11, family)]
    if weight is not None:
        body += [u32(3, _MASQUERADE), u32(4, weight), u32(5, 0), u32(6, 0)]
    return nest(_DEST, *body)


def _packed(address: str) -> bytes:
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return socket.inet_pton(socket.AF_INET, address) + bytes(12)


def _address(family: int, packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6, packed) if family == socket.AF_INET6 else socket.inet_ntoa(packed[:4])


def _service_id(entry: dict[int, bytes]) -> ServiceId:
    family = netlink.as_int(entry.get(1))
    version = 6 if family == socket.AF_INET6 else 4
    if mark := netlink.as_int(entry.get(5)):
        return ServiceId(version, mark=mark)
    number = netlink.as_int(entry.get(2))
    return ServiceId(
        version,
        _address(family, entry[3]),
        int.from_bytes(entry[4], "big"),
        _PROTOCOL_NAMES.get(number, str(number)),
    )
