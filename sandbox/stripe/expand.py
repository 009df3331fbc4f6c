"""`expand[]`: ids replaced by the objects that they name, up to four levels deep, in one object or in a list's data."""

from __future__ import annotations

from sandbox.stripe import errors, views
from sandbox.stripe.forms import Json, JsonObject
from sandbox.stripe.world import World

DEPTH_MAX = 4
PATHS_MAX = 20
OPTIONAL = frozenset({("refund", "failure_balance_transaction")})
"""Members that may be expanded and that an object only has in some states."""


def expand(world: World, view: JsonObject, paths: list[str]) -> JsonObject:
    """`view` with every path of `paths` expanded (in place). 400 when a path can't be."""
    if len(paths) > PATHS_MAX:
        raise errors.invalid(f"You cannot expand more than {PATHS_MAX} properties.", param="expand")
    for path in paths:
        steps = path.split(".")
        if view.get("object") in ("list", "search_result"):
            if steps[0] != "data":
                raise _refused(path)
            steps = steps[1:]
            if len(steps) > DEPTH_MAX:
                raise errors.invalid(f"You cannot expand more than {DEPTH_MAX} levels of a property.", param="expand")
            data = view["data"]
            assert isinstance(data, list)
            for item in data:
                _walk(world, item, steps, path)
        else:
            if len(steps) > DEPTH_MAX:
                raise errors.invalid(f"You cannot expand more than {DEPTH_MAX} levels of a property.", param="expand")
            _walk(world, view, steps, path)
    return view


def _refused(path: str) -> errors.StripeError:
    return errors.invalid(f"This property cannot be expanded ({path}).", param="expand")


def _walk(world: World, node: Json, steps: list[str], path: str) -> None:
    if not steps:
        return
    if isinstance(node, list):
        for item in node:
            _walk(world, item, steps, path)
        return
    if not isinstance(node, dict):
        return
    head, rest = steps[0], steps[1:]
    if head not in node:
        if (node.get("object"), head) in OPTIONAL:
            return
        raise _refused(path)
    value = node[head]
    if isinstance(value, str):
        found = views.by_id(world, value)
        if found is None:
            if _external(value):
                return
            raise _refused(path)
        node[head] = value = found
    _walk(world, value, rest, path)


def _external(value: str) -> bool:
    """Whether `value` names something that Stripe would expand and the stand-in doesn't hold (a bank account)."""
    return value.startswith(("ba_", "acct_"))
