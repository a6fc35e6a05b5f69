"""The CNI protocol: versions, the request in the environment and on stdin, errors. Results are in `results`.

Pure: environment and stdin are arguments, answers are return values. Sources: the CNI specification 1.1.0, and the
reference implementation's libcni where the specification is silent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = VERSIONS[-1]
UNSAID = "0.1.0"
"""What a configuration without cniVersion means to libcni."""

INCOMPATIBLE, UNSUPPORTED_FIELD, UNKNOWN_CONTAINER, BAD_ENVIRONMENT, IO_FAILURE = 1, 2, 3, 4, 5
DECODING, BAD_CONFIG, BAD_NETNS, TRY_LATER = 6, 7, 8, 11
CANNOT_ADD, DEGRADED = 50, 51
FAILED = 100
"""Our own: a step of the work failed; the message says which."""

REQUIRED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
    "VERSION": (),
}
"""Environment variables without which a verb cannot be served (CNI_PATH as the reference's skel asks)."""

SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
"""The specification version that brought a verb."""

KEYS = """
    cniVersion name type prevResult runtimeConfig args cni capabilities stateDir
    bridge isGateway isDefaultGateway forceAddress ipMasq ipMasqBackend nonMasqueradeCIDRs mtu hairpinMode promiscMode
    vlan vlanTrunk minID maxID id preserveDefaultVlan macspoofchk enabledad disableContainerInterface portIsolation
    mac ips ipam subnet rangeStart rangeEnd gateway ranges routes dst gw advmss priority table scope dataDir resolvConf
    dns nameservers domain search options servers searches ipRanges
    portMappings hostPort containerPort protocol hostIP
    snat masqAll markMasqBit externalSetMarkChain conditionsV4 conditionsV6 backend
    bandwidth shapedSubnets unshapedSubnets ingressRate ingressBurst egressRate egressBurst
    interfaces sandbox socketPath pciID interface address ip4 ip6 ip containerID ifname
"""
"""All keys that we read, as they are spelled."""

_SPELLING = {key.lower(): key for key in KEYS.split()}
_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*\Z")


class CniError(Exception):
    """An answer that is an error: one of the specification's codes (or 100 and above, ours), a message, details."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def render(self, version: str) -> str:
        """Return the error object."""
        answer: dict[str, Any] = {"cniVersion": version, "code": self.code, "msg": self.message}
        if self.details:
            answer["details"] = self.details
        return json.dumps(answer) + "\n"


class Request(NamedTuple):
    """One call: the environment's part, and the configuration decoded."""

    command: str
    container: str = ""
    netns: str = ""
    ifname: str = ""
    args: Mapping[str, str] = {}
    path: str = ""
    config: Mapping[str, Any] = {}
    stdin: bytes = b""
    version: str = NEWEST

    @property
    def network(self) -> str:
        """The network's name."""
        return str(self.config.get("name", ""))


def at_least(version: str, other: str) -> bool:
    """Say whether `version` is `other` or newer; both are known versions."""
    return VERSIONS.index(version) >= VERSIONS.index(other)


# --- the request


def command_of(environment: Mapping[str, str]) -> str:
    """Return the verb. Raise `CniError` for an unknown one, with all other missing variables in the same message."""
    command = environment.get("CNI_COMMAND", "")
    missing = [key for key in REQUIRED.get(command, ()) if not environment.get(key)]
    if not command:
        missing.insert(0, "CNI_COMMAND")
    if missing:
        raise CniError(BAD_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")
    if command not in REQUIRED:
        raise CniError(BAD_ENVIRONMENT, f"unknown CNI_COMMAND: {command}", f"known: {', '.join(REQUIRED)}")
    return command


def request(environment: Mapping[str, str], stdin: bytes) -> Request:
    """Return the request, all of it checked. Raise `CniError`."""
    command = command_of(environment)
    if command == "VERSION":
        return Request(command, stdin=stdin)
    config = decode(stdin)
    version = version_of(config)
    name = config.get("name", "")
    if not isinstance(name, str) or not _CONTAINER.match(name):
        if not name:
            raise CniError(BAD_CONFIG, "missing network name: the configuration's field name is empty")
        raise CniError(BAD_CONFIG, f"invalid characters found in network name: field name is {name!r}")
    if command in SINCE and not at_least(version, SINCE[command]):
        raise CniError(
            INCOMPATIBLE, f"config version {version} does not allow {command}: it came with {SINCE[command]}"
        )
    container, ifname = environment.get("CNI_CONTAINERID", ""), environment.get("CNI_IFNAME", "")
    if command in ("ADD", "DEL", "CHECK"):
        if not _CONTAINER.match(container):
            raise CniError(BAD_ENVIRONMENT, "invalid characters in containerID", f"CNI_CONTAINERID={container}")
        _check_ifname(ifname)
        if not _is_unicode(environment.get("CNI_NETNS", "")):
            raise CniError(BAD_ENVIRONMENT, "CNI_NETNS is no UTF-8 text", ascii(environment["CNI_NETNS"]))
    return Request(
        command=command,
        container=container,
        netns=environment.get("CNI_NETNS", ""),
        ifname=ifname,
        args=arguments(environment.get("CNI_ARGS", "")),
        path=environment.get("CNI_PATH", ""),
        config=config,
        stdin=stdin,
        version=version,
    )


def decode(stdin: bytes) -> dict[str, Any]:
    """Return the configuration on stdin. Raise `CniError` 6 when it is not a JSON object."""
    try:
        config = json.loads(stdin.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CniError(DECODING, f"the configuration on stdin is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CniError(DECODING, "the configuration on stdin is not a JSON object")
    canonical: dict[str, Any] = _canonical(config, 0)
    return canonical


def _canonical(value: Any, depth: int) -> Any:
    """Return decoded JSON with our keys as we spell them: Go plugins ignore case, and containerd writes `HostPort`."""
    if depth > 30:
        raise CniError(DECODING, "the configuration on stdin is nested too deeply")
    if isinstance(value, str) and (value.isascii() is False or "\0" in value):
        return _refuse_unprintable(value)
    if isinstance(value, list):
        return [_canonical(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, item in value.items():
        name = _SPELLING.get(key.lower(), key)
        found[key if name != key and name in value else name] = _canonical(item, depth + 1)
    return found


def version_of(config: Mapping[str, Any]) -> str:
    """Return the configuration's version. Raise `CniError` 6 for what is no version, 1 for one we do not speak."""
    version = config.get("cniVersion") or UNSAID
    if not isinstance(version, str) or not re.fullmatch(r"\d{1,4}\.\d{1,4}\.\d{1,4}", version):
        raise CniError(DECODING, f"field cniVersion is not a version: {version!r}")
    if version not in VERSIONS:
        raise CniError(
            INCOMPATIBLE, "incompatible CNI versions", f"config is {version}, plugin supports {list(VERSIONS)}"
        )
    return version


def arguments(value: str) -> dict[str, str]:
    """Return CNI_ARGS as a mapping. Raise `CniError` 4 for a pair without exactly one `=`."""
    found = {}
    for pair in value.split(";") if value else ():
        key, equals, argument = pair.partition("=")
        if not equals or "=" in argument:
            raise CniError(BAD_ENVIRONMENT, f"CNI_ARGS: invalid pair {pair!r}: expected KEY=VALUE;KEY=VALUE")
        found[key] = argument
    return found


def known_arguments(args: Mapping[str, str], known: tuple[str, ...]) -> None:
    """Refuse unknown CNI_ARGS unless IgnoreUnknown is set. Raise `CniError` 4."""
    ignore = args.get("IgnoreUnknown", "0").lower()
    if ignore not in ("0", "1", "false", "true"):
        raise CniError(BAD_ENVIRONMENT, f"CNI_ARGS: IgnoreUnknown is {ignore!r}, expected 1, true, 0 or false")
    if ignore in ("1", "true"):
        return
    unknown = [key for key in args if key not in (*known, "IgnoreUnknown")]
    if unknown:
        raise CniError(BAD_ENVIRONMENT, f"CNI_ARGS: unknown args {unknown}", "set IgnoreUnknown=1 to pass them over")


def _check_ifname(name: str) -> None:
    said = ""
    if not _is_unicode(name):
        raise CniError(BAD_ENVIRONMENT, "interface name is no UTF-8 text", f"CNI_IFNAME={name!a}")
    if len(name.encode(errors="surrogateescape")) > 15:
        said = "interface name is too long: at most 15 characters"
    elif name in (".", ".."):
        said = "interface name is . or .."
    elif any(char in "/:" or char.isspace() for char in name):
        said = "interface name contains / or : or whitespace characters"
    elif "%" in name:
        said = "interface name contains %, for which the kernel would put a number"
    if said:
        raise CniError(BAD_ENVIRONMENT, said, f"CNI_IFNAME={name}")


def _is_unicode(value: str) -> bool:
    """Say whether a variable of the environment was UTF-8: what was not, is there as lone surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python's decoder knows and JSON does not."""
    raise ValueError(f"{name} is no JSON value")


def _refuse_unprintable(value: str) -> str:
    """Return text that files, links and rules can hold. Raise `CniError` for half surrogates and zero bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CniError(DECODING, f"the configuration on stdin holds text that is no Unicode: {value!r}") from None
    if "\0" in value:
        raise CniError(DECODING, f"the configuration on stdin holds a zero byte: {value!r}")
    return value


# --- answers


def version_answer(asked: str = NEWEST) -> str:
    """Return the answer to VERSION."""
    return json.dumps({"cniVersion": asked, "supportedVersions": list(VERSIONS)}) + "\n"
