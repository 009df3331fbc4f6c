"""Keys that were made in a search for other slots: kept with their slots, and given out before more are made."""

from __future__ import annotations

from array import array

from oncepay.keys import slot


class Aside:
    """Keys in the order in which they came, the newest leaving first: an order that has nothing to do with their slots, so
    that neither what is taken from a range nor what is left of it leans to one side.
    """

    __slots__ = ("_keys", "_slots")

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._slots = array("H")

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, its_slot: int) -> None:
        """Keep `key`; `its_slot` is the caller's word, which was worked out already."""
        self._keys.append(key)
        self._slots.append(its_slot)

    def put(self, keys: list[str]) -> None:
        """Keep all of `keys`."""
        for key in keys:
            self.add(key, slot(key))

    def take_in(self, first: int, last: int, count: int) -> list[str]:
        """Up to `count` keys of the slots `first` to `last`; one look at each key, some 50 ns."""
        keys, slots = self._keys, self._slots
        taken: list[str] = []
        passed: list[int] = []
        at = len(keys)
        while at and len(taken) < count:
            at -= 1
            if first <= slots[at] <= last:
                taken.append(keys[at])
            else:
                passed.append(at)
        passed.reverse()
        keys[at:] = [keys[index] for index in passed]
        slots[at:] = array("H", [slots[index] for index in passed])
        return taken

    def take(self, count: int) -> list[str]:
        """Up to `count` keys of any slot, one at least."""
        assert count > 0
        taken = self._keys[-count:]
        del self._keys[-count:]
        del self._slots[-count:]
        return taken
