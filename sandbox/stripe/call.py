"""One API call, as handlers see it, and what they hand back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from sandbox.stripe.forms import JsonObject, Params
from sandbox.stripe.world import World


class Call(msgspec.Struct):
    """One call. `id` is the id in the path, `publishable` whether the key is a browser's, `url` the origin that was called."""

    params: Params
    id: str
    request_id: str
    idempotency_key: str | None
    publishable: bool
    url: str


class Object(msgspec.Struct):
    """An object of `kind` to be shown; the idempotency layer keeps it packed. `more` is added to what is shown."""

    kind: str
    row: Any
    more: JsonObject | None = None


Result: TypeAlias = Object | JsonObject
Handler: TypeAlias = Callable[[World, Call], Result]
