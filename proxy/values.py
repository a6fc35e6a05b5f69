"""How Go's flags spell durations and booleans, read and written. Pure."""

from __future__ import annotations

import re

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_TRUE = {"1", "t", "T", "TRUE", "true", "True"}
_FALSE = {"0", "f", "F", "FALSE", "false", "False"}


def duration(text: str) -> float:
    """Return the seconds of `1h30m`, `500ms`, `0`, or a plain number of seconds. Raise `ValueError`."""
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d*)?", text):
        return float(text)
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"expected a duration as 30s, 1m30s or 500ms, found {text!r}")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def boolean(text: str) -> bool:
    """Return the truth of `true`, `false` and Go's other spellings. Raise `ValueError`."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"expected true or false, found {text!r}")


def texts(text: str) -> tuple[str, ...]:
    """Return the parts of a list with commas; surrounding blanks and empty parts are not part of it."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def gates(text: str) -> dict[str, bool]:
    """Return `A=true,B=false` as a mapping. Raise `ValueError`."""
    found = {}
    for part in texts(text):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"expected NAME=true or NAME=false, found {part!r}")
        found[name.strip()] = boolean(value.strip())
    return found


def spelled(value: object, *, is_duration: bool = False) -> str:
    """Return a setting as a flag spells it: `true`, `30s`, `a,b`; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ",".join(f"{name}={spelled(each)}" for name, each in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if is_duration and isinstance(value, int | float):
        return f"{value:.9f}".rstrip("0").rstrip(".") + "s"  # no exponent, which no reader of a duration knows
    return str(value)
