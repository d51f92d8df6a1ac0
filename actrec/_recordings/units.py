"""Units: passes that the user opened and named. A key is an integer or a string, unique in its recording."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any, Final, TypeAlias

from actrec.errors import OptionError

from .pass_numbers import RankPass

#: What identifies a unit.
Key: TypeAlias = int | str

_LARGEST: Final = (1 << 63) - 1


class Units:
    """Which passes of a recording are units, and their keys. A recording and its layers share one object."""

    def __init__(self) -> None:
        self._keys: dict[RankPass, Key] = {}  # made here: threads may ask for it at once
        self.open: dict[RankPass, Key] = {}  # the keys of units that have not ended

    @property
    def keys(self) -> dict[RankPass, Key]:
        """The key of each pass that is a unit, in the order of the passes."""
        return self._keys

    def __len__(self) -> int:
        return len(self.keys)

    def of(self, rank_passes: Iterable[RankPass]) -> list[Key | None]:
        """Return the key of each of these passes, ``None`` for those that are not units."""
        known = {**self.keys, **self.open} if self.open else self.keys
        return [*map(known.get, rank_passes)]

    def copy(self) -> Units:
        """Return a copy, without open units, that does not change with the recording."""
        copied = Units()
        copied.keys.update(self.keys)
        return copied


def missing(call: str, wanted: Iterable[Key], done: Iterable[Key]) -> list[Key]:
    """Return the keys of ``wanted`` that are not in ``done``, in order, each once."""
    keys = dict.fromkeys(checked_key(call, key) for key in wanted)
    done = set(done)
    return [key for key in keys if key not in done]


def checked_key(call: str, key: Any) -> Key:
    """Return ``key`` as an ``int`` or a ``str``.

    Raises:
        OptionError: ``key`` is neither, or cannot be stored.
    """
    if isinstance(key, bool) or not isinstance(key, (Integral, str)):
        message = f"{call}: the key {key!r} is a {type(key).__name__}. The key of a unit is an int or a str."
        raise OptionError(message)
    if isinstance(key, str):
        try:
            key.encode()
        except UnicodeEncodeError as error:
            message = f"{call}: the key {key!r} cannot be stored as text ({error.reason})."
            raise OptionError(message) from None
        return str(key)
    number = int(key)  # of NumPy, too
    if not -_LARGEST <= number <= _LARGEST:
        message = f"{call}: the key {number} is too large for 64 bits. Use a string."
        raise OptionError(message)
    return number
