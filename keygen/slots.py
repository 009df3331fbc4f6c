"""Keys for the slots of one range: which ranges may be asked for, so that a search has a bound."""

from __future__ import annotations

from typing import NamedTuple

from oncepay.errors import InvalidField
from oncepay.keys import SLOTS

NARROWEST_SLOTS = 64
"""One key in 1,024 fits a range so narrow."""
SEARCH_KEYS = 1 << 17
"""As many keys as a request may be expected to look through."""


class SlotRange(NamedTuple):
    """Slots `first` to `last`, both included, 0 to 65,535."""

    first: int
    last: int

    @property
    def width(self) -> int:
        return self.last - self.first + 1


def check(slots: SlotRange, count: int) -> None:
    """InvalidField when the range is empty, too narrow, or too narrow for `count` keys."""
    if slots.first > slots.last:
        raise InvalidField("the first slot comes after the last", field="slots")
    if slots.width < NARROWEST_SLOTS:
        raise InvalidField(f"a range has at least {NARROWEST_SLOTS} slots, this one has {slots.width}", field="slots")
    most = SEARCH_KEYS * slots.width // SLOTS
    if count > most:
        raise InvalidField(f"of {slots.width} slots a request may ask for up to {most} keys", field="count")
