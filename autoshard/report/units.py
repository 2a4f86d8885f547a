"""Numbers for people: bytes, seconds and shares. SI inside, formatted only here."""

from __future__ import annotations

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_SECONDS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def nbytes(count: float) -> str:
    """``1.50 GiB``; binary units, as device memory is quoted."""
    unit = byte_unit(count)
    return f"{in_bytes(count, unit)} {unit}"


def byte_unit(count: float) -> str:
    """The largest binary unit of which ``count`` is at least one."""
    return _BINARY[min(len(_BINARY) - 1, max(0, (int(abs(count)).bit_length() - 1) // 10))]


def in_bytes(count: float, unit: str) -> str:
    """``count`` bytes in that unit, without its name."""
    if unit == "B":
        return f"{count:.0f}"
    value = count / 1024 ** _BINARY.index(unit)
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def seconds(value: float) -> str:
    """``1.23 s``, ``45.6 ms``, ``7.80 us``."""
    unit = second_unit(value)
    return f"{in_seconds(value, unit)} {unit}"


def second_unit(value: float) -> str:
    """The largest of seconds, milliseconds and microseconds of which ``value`` is at least one."""
    if not value:
        return "s"
    return next((unit for unit, size in _SECONDS if abs(value) >= size), "us")


def in_seconds(value: float, unit: str) -> str:
    """``value`` seconds in that unit with three digits, without its name."""
    value /= dict(_SECONDS)[unit]
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def percent(share: float) -> str:
    """``12.3 %``; what is too small to show is not shown as nothing."""
    if 0 < share < 5e-4:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share else "0 %"
