"""Numbers that tell whether anybody looked at them.

Equal layers differ in their index. Whether that index matters is seen rather than guessed: while a
layer is traced, its index is an object that behaves like the number and remembers being used.
"""

from __future__ import annotations

from typing import Any


class Watched:
    """Stands for an integer; ``used`` once anything but identity was asked of it."""

    __slots__ = ("used", "value")

    def __init__(self, value: int) -> None:
        self.value = value
        self.used = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.read(), name)

    def read(self) -> int:
        """The number; from now on it was used."""
        self.used = True
        return self.value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        self.used = True
        return int


def _forwarded(name: str) -> Any:
    def method(self: Watched, *others: Any) -> Any:
        plain = (o.read() if type(o) is Watched else o for o in others)
        return getattr(int, name)(self.read(), *plain)

    method.__name__ = name
    return method


_OWN = {
    "__class__", "__getattribute__", "__getattr__", "__setattr__", "__delattr__", "__init__",
    "__new__", "__init_subclass__", "__subclasshook__", "__doc__", "__dir__", "__sizeof__",
    "__reduce__", "__getstate__", "__slots__", "__getnewargs__",
}  # fmt: skip

for _name in dir(int):
    if _name.startswith("__") and _name not in _OWN:
        setattr(Watched, _name, _forwarded(_name))


def _reduce(self: Watched, protocol: Any) -> Any:
    """A copy is the plain number."""
    return int, (self.read(),)


Watched.__reduce_ex__ = _reduce  # type: ignore[assignment]
