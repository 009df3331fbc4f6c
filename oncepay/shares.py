"""Who may use how much of the account's rate budget: one record for all processes, which only compare-and-put changes.

The invariant: the shares in the record never sum to more than what is dealt out, and no process goes faster than its share in
the record as it was last seen there. A process lowers its own rate before it writes a smaller share, and raises it after a larger
one is written. So nothing is exceeded while processes come, go, die or freeze, nor while etcd is away: then nobody can write, and
everybody goes on as before. Pure: records in, records out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

import msgspec
from msgspec.structs import replace

PARK_S = 600.0
"""How long the share of a process that vanished stays its own: it may be cut off from etcd, and still call Stripe. A process that
comes again under the same name takes it over, and one that ends in order gives it back."""

Rates = dict[str, float]
"""Requests a second, by endpoint class."""


class Member(msgspec.Struct, frozen=True):
    """A process that has a share. `gone_s`: since when (seconds since 1970) it was not seen alive; 0 while it is."""

    role: str
    rates: Rates
    gone_s: float = 0.0


class Record(msgspec.Struct, frozen=True):
    """All members, by name."""

    members: dict[str, Member] = {}

    def roles(self) -> dict[str, int]:
        """How many members have each role."""
        found: dict[str, int] = {}
        for member in self.members.values():
            found[member.role] = found.get(member.role, 0) + 1
        return found

    def free(self, endpoint: str, whole: float, name: str) -> float:
        """What of `whole` nobody but `name` has."""
        return whole - sum(member.rates.get(endpoint, 0.0) for key, member in self.members.items() if key != name)


class Policy(msgspec.Struct, frozen=True):
    """How much is dealt out, and what a process may have of it at most.

    `whole(endpoint, members)` is dealt out to so many members together; `fair(endpoint, roles)` is this process's part.
    """

    endpoints: tuple[str, ...]
    whole: Callable[[str, int], float]
    fair: Callable[[str, Mapping[str, int]], float]


def deal(
    record: Record,
    name: str,
    role: str,
    current: Mapping[str, float],
    alive: Set[str],
    policy: Policy,
    now_s: float,
    *,
    grow: bool,
) -> Record:
    """The record as `name` would have it: its own share by what is fair and free, and who is gone marked, or taken out.

    `current` is how fast it goes now; a record that doesn't know it (it was lost) gets that first. Without `grow` its share
    only shrinks.
    """
    members = {key: _seen(member, key in alive, now_s) for key, member in record.members.items()}
    members = {key: member for key, member in members.items() if not _is_over(member, now_s) or key == name}
    known = members.get(name)
    members[name] = Member(role, dict(known.rates if known is not None else current))
    made = Record(members)
    roles, count = made.roles(), len(members)
    rates = {}
    for endpoint in policy.endpoints:
        has = members[name].rates.get(endpoint, 0.0)
        may = max(0.0, min(policy.fair(endpoint, roles), made.free(endpoint, policy.whole(endpoint, count), name)))
        rates[endpoint] = may if grow else min(has, may)
    members[name] = replace(members[name], rates=rates)
    return Record(members)


def _seen(member: Member, is_alive: bool, now_s: float) -> Member:
    if is_alive:
        return member if not member.gone_s else replace(member, gone_s=0.0)
    return member if member.gone_s else replace(member, gone_s=now_s)


def _is_over(member: Member, now_s: float) -> bool:
    return bool(member.gone_s) and now_s - member.gone_s > PARK_S


def without(record: Record, name: str) -> Record:
    """The record after `name` has given its share back."""
    return Record({key: member for key, member in record.members.items() if key != name})


def slowed(current: Mapping[str, float], record: Record, name: str) -> Rates:
    """How fast `name` may go at most, by what it goes now and what the record gives it."""
    member = record.members.get(name)
    return {endpoint: min(rate, member.rates.get(endpoint, 0.0)) if member else rate for endpoint, rate in current.items()}
