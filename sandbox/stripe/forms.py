"""Form bodies and query strings as Stripe reads them: `a[b]=c`, `a[]=c`, `a[0]=c`, and typed access to them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias
from urllib.parse import parse_qsl

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = dict[str, Json]
Value: TypeAlias = "str | list[Value] | dict[str, Value]"

FIELDS_MAX = 1_000
DEPTH_MAX = 6
METADATA_KEYS_MAX = 50
METADATA_KEY_LENGTH_MAX = 40
METADATA_VALUE_LENGTH_MAX = 500
_INTEGER = re.compile(r"-?\d{1,18}\Z")


def names(text: str) -> frozenset[str]:
    """The words of `text`, as the set of parameters that a call takes."""
    return frozenset(text.split())


class FormError(ValueError):
    """The form can't be read; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def pairs(text: str) -> list[tuple[str, str]]:
    """The form's names and values, decoded, in their order."""
    try:
        return parse_qsl(text, keep_blank_values=True, max_num_fields=FIELDS_MAX)
    except ValueError as error:
        raise FormError(f"Invalid form encoding: {error}") from error


def nest(flat: Iterable[tuple[str, str]]) -> dict[str, Value]:
    """The nested form of `flat`: names with brackets become dicts and lists."""
    plain: dict[str, Value] = {}
    nested: dict[str, dict[str, object]] = {}
    for name, value in flat:
        bracket = name.find("[")
        if bracket < 0:
            plain[name] = value
            continue
        head, keys = name[:bracket], name[bracket + 1 :].rstrip("]").split("][")
        if not head or len(keys) > DEPTH_MAX:
            raise FormError(f"Invalid parameter name: {name}", name)
        node = nested.setdefault(head, {})
        for depth, key in enumerate(keys):
            place = key or str(len(node))
            if depth == len(keys) - 1:
                node[place] = value
                break
            inner = node.setdefault(place, {})
            if not isinstance(inner, dict):
                raise FormError(f"Invalid parameter name: {name}", name)
            node = inner
    for head, node in nested.items():
        plain[head] = _settle(node)
    return plain


def _settle(node: dict[str, object]) -> Value:
    values: dict[str, Value] = {key: _settle(value) if isinstance(value, dict) else str(value) for key, value in node.items()}
    if all(key.isdigit() for key in values):
        return [values[key] for key in sorted(values, key=int)]
    return values


def decode(text: str) -> Params:
    """`text` (a query string or a form) as parameters."""
    return Params(nest(pairs(text)))


class Params:
    """The parameters of a call. Getters raise FormError with Stripe's words when the type is wrong."""

    __slots__ = ("path", "values")

    def __init__(self, values: dict[str, Value], path: str = "") -> None:
        self.values = values
        self.path = path

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def name(self, key: str) -> str:
        """How the caller wrote `key`."""
        return f"{self.path}[{key}]" if self.path else key

    def allow(self, known: frozenset[str]) -> None:
        """Refuse parameters that aren't `known`."""
        for key in self.values:
            if key not in known:
                name = self.name(key)
                raise FormError(f"Received unknown parameter: {name}", name, "parameter_unknown")

    def text(self, key: str) -> str | None:
        """A string, or None when absent or empty."""
        value = self.values.get(key)
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise FormError(f"Invalid string: {key}", self.name(key))
        if len(value) > 5_000:
            raise FormError(f"Invalid string: {self.name(key)} is too long", self.name(key))
        return value

    def integer(self, key: str) -> int | None:
        """An integer, or None when absent or empty."""
        value = self.text(key)
        if value is None:
            return None
        if not _INTEGER.match(value):
            raise FormError(f"Invalid integer: {value}", self.name(key), "parameter_invalid_integer")
        return int(value)

    def boolean(self, key: str) -> bool | None:
        """A boolean, or None when absent or empty."""
        value = self.text(key)
        if value is None:
            return None
        if value not in ("true", "false", "True", "False", "1", "0"):
            raise FormError(f"Invalid boolean: {value}", self.name(key))
        return value in ("true", "True", "1")

    def choice(self, key: str, allowed: Iterable[str]) -> str | None:
        """One of `allowed`, or None when absent."""
        value = self.text(key)
        options = tuple(allowed)
        if value is not None and value not in options:
            shown = ", ".join(options[:-1]) + f", or {options[-1]}" if len(options) > 1 else options[0]
            raise FormError(f"Invalid {self.name(key)}: must be one of {shown}", self.name(key))
        return value

    def inner(self, key: str) -> Params | None:
        """A hash, or None when absent or empty."""
        value = self.values.get(key)
        if value is None or value == "" or value == []:
            return None
        if not isinstance(value, dict):
            raise FormError("Invalid object", self.name(key))
        return Params(value, self.name(key))

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None when absent."""
        value = self.values.get(key)
        if value is None or value == "":
            return None
        if isinstance(value, (dict, str)) or not all(isinstance(item, str) for item in value):
            raise FormError("Invalid array", self.name(key))
        return [item for item in value if isinstance(item, str)]

    def json(self, key: str) -> Json:
        """The value as it came, strings within."""
        return _as_json(self.values.get(key))

    def merge_metadata(self, before: dict[str, str]) -> dict[str, str]:
        """`before` with this call's metadata: empty values delete a key, an empty whole clears."""
        value = self.values.get("metadata")
        if value is None:
            return before
        if value == "" or value == []:
            return {}
        if not isinstance(value, dict):
            raise FormError("Invalid object", self.name("metadata"))
        merged = dict(before)
        for key, item in value.items():
            if not isinstance(item, str):
                raise FormError("Metadata values must be strings", f"metadata[{key}]")
            if len(key) > METADATA_KEY_LENGTH_MAX or len(item) > METADATA_VALUE_LENGTH_MAX:
                raise FormError(
                    f"Metadata keys can have up to {METADATA_KEY_LENGTH_MAX} characters, "
                    f"values up to {METADATA_VALUE_LENGTH_MAX}",
                    "metadata",
                )
            if item == "":
                merged.pop(key, None)
            else:
                merged[key] = item
        if len(merged) > METADATA_KEYS_MAX:
            raise FormError(f"Metadata can have up to {METADATA_KEYS_MAX} keys", "metadata")
        return merged


def _as_json(value: Value | None) -> Json:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return value
