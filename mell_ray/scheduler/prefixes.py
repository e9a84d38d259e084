"""Which GPU has computed which prefix: the global prompt tree of MemServe, as a hash index.

Prefixes come as chained block hashes, so a block's hash names all that is before it, and the tree
needs no edges: the longest run of leading hashes that a GPU knows is its match.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

Place = TypeVar("Place", bound=Hashable)


class PrefixIndex(Generic[Place]):
    """What placed requests have left in the prefix caches, as far as the scheduler can know.

    Each GPU is believed to keep the latest ``capacity / units_per_block`` blocks. A wrong belief
    costs a prefill that a hit would have saved, nothing else.
    """

    def __init__(self, units_per_block: int) -> None:
        self._units = units_per_block
        self._known: dict[Place, OrderedDict[bytes, None]] = {}  # least recently used first
        self._where: dict[bytes, dict[Place, None]] = {}

    def record(self, gpu: Place, prefix: Sequence[bytes], capacity: int) -> None:
        """A request with that prefix runs on ``gpu``, which holds ``capacity``, from now on."""
        known = self._known.setdefault(gpu, OrderedDict())
        for block in prefix:
            known[block] = None
            known.move_to_end(block)
            self._where.setdefault(block, {})[gpu] = None
        while len(known) * self._units > capacity:
            block, _ = known.popitem(last=False)
            self._drop(block, gpu)

    def _drop(self, block: bytes, gpu: Place) -> None:
        places = self._where[block]
        del places[gpu]
        if not places:
            del self._where[block]

    def matches(self, prefix: Sequence[bytes]) -> dict[Place, int]:
        """Units of the prefix that each GPU has; only GPUs that have some."""
        found: dict[Place, int] = {}
        for count, block in enumerate(prefix, start=1):
            have = self._where.get(block)
            if have is None:
                break
            if count == 1:
                found = dict.fromkeys(have, self._units)
                continue
            longer = [gpu for gpu in have if found.get(gpu) == (count - 1) * self._units]
            if not longer:
                break
            for gpu in longer:
                found[gpu] = count * self._units
        return found

    def match(self, gpu: Place, prefix: Sequence[bytes]) -> int:
        """Units of the prefix that ``gpu`` has."""
        known = self._known.get(gpu)
        count = 0
        if known is not None:
            for block in prefix:
                if block not in known:
                    break
                count += 1
        return count * self._units

    def forget(self, gpu: Place) -> None:
        """The GPU is gone, and its cache with it."""
        for block in self._known.pop(gpu, ()):
            self._drop(block, gpu)

    def __len__(self) -> int:
        """Blocks known, each GPU's counted."""
        return sum(len(known) for known in self._known.values())
