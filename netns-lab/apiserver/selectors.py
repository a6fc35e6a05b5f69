"""Label and field selectors: text in, a predicate over objects out. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from apiserver.errors import ApiError, bad_request
from apiserver.resources import Resource

Predicate = Callable[[Mapping[str, Any]], bool]
_SET = re.compile(r"^\s*([\w./-]+)\s+(in|notin)\s*\(([^)]*)\)\s*$")
_EQUAL = re.compile(r"^\s*([\w./-]+)\s*(==|=|!=)\s*([\w.-]*)\s*$")
_EXISTS = re.compile(r"^\s*(!?)\s*([\w./-]+)\s*$")
_UNLESS_COMMA_IN_BRACKETS = re.compile(r",(?![^(]*\))")
ALWAYS_KNOWN = ("metadata.name", "metadata.namespace")


def everything(_obj: Mapping[str, Any]) -> bool:
    """Select all."""
    return True


def labels(selector: str) -> Predicate:
    """Return the predicate of a label selector. Raise `ApiError` 400."""
    if not selector.strip():
        return everything
    terms = [_label_term(term) for term in _UNLESS_COMMA_IN_BRACKETS.split(selector)]

    def selected(obj: Mapping[str, Any]) -> bool:
        found = obj["metadata"].get("labels") or {}
        return all(term(found) for term in terms)

    return selected


def _label_term(term: str) -> Callable[[Mapping[str, str]], bool]:
    if match := _SET.match(term):
        key, operator, listed = match.groups()
        values = {value.strip() for value in listed.split(",")}
        if operator == "in":
            return lambda found: found.get(key) in values
        return lambda found: found.get(key) not in values
    if match := _EQUAL.match(term):
        key, operator, value = match.groups()
        if operator == "!=":
            return lambda found: found.get(key) != value
        return lambda found: found.get(key) == value
    if match := _EXISTS.match(term):
        absent, key = match.groups()
        return (lambda found: key not in found) if absent else (lambda found: key in found)
    raise bad_request(f"unable to parse requirement: found {term!r}, expected: in, notin, =, ==, !=, or an identifier")


def fields(selector: str, resource: Resource) -> Predicate:
    """Return the predicate of a field selector. Raise `ApiError` 400 for fields that the resource has not."""
    if not selector.strip():
        return everything
    terms = []
    for term in selector.split(","):
        match = _FIELD.match(term)
        if not match:
            raise bad_request(f"invalid selector: {selector!r}; can't understand {term!r}")
        path, operator, value = match.groups()
        if path not in ALWAYS_KNOWN + resource.fields:
            raise ApiError(400, "BadRequest", f"field label not supported: {path}")
        terms.append((path.split("."), operator != "!=", value))

    def selected(obj: Mapping[str, Any]) -> bool:
        return all((_at(obj, path) == value) is wanted for path, wanted, value in terms)

    return selected


_FIELD = re.compile(r"^\s*([\w./-]+)\s*(==|=|!=)\s*(.*?)\s*$")


def _at(obj: Mapping[str, Any], path: list[str]) -> str:
    value: Any = obj
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def both(first: Predicate, second: Predicate) -> Predicate:
    """Select what both select."""
    if first is everything:
        return second
    if second is everything:
        return first
    return lambda obj: first(obj) and second(obj)
