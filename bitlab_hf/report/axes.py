"""Axes of a plot: where a value lies, which values get a label, and how numbers read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


def number(value: float) -> str:
    """Returns a number with three digits, as short as it can be read."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):g}" if abs(value) < 100 else f"{value:.4g}"


def percent(value: float) -> str:
    """Returns a share as a percentage."""
    return f"{number(100 * value)} %"


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        low: Value at its start.
        high: Value at its end.
        log: Whether equal distances are equal ratios.
        label: What it shows.
        text: Writes a value.
        ticks: Labelled values.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    label: str = ""
    text: Callable[[float], str] = number

    def at(self, value: float) -> float:
        """Returns where a value lies: 0 at the start, 1 at the end; beyond them at the nearer."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        *,
        label: str = "",
        text: Callable[[float], str] = number,
        log: bool = False,
        zero: bool = False,
        tight: bool = False,
        parts: int = 5,
    ) -> Axis:
        """Returns an axis that holds the values.

        Args:
            values: What it has to hold; none gives 0 to 1.
            label: What it shows.
            text: Writes a value.
            log: Equal distances are equal ratios; taken only if all values are above 0.
            zero: Whether it starts at 0 at the latest.
            tight: Whether it ends at the values, not at the next tick.
            parts: About how many parts the ticks make.
        """
        found = sorted(values)
        low, high = (found[0], found[-1]) if found else (0.0, 1.0)
        if log and low > 0:
            low, high = (low / 1.06, high * 1.06) if high / low < 4 else (low / 1.2, high * 1.2)
            return cls(low, high, _log_ticks(low, high, parts), True, label, text)
        low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
        step = _step((high - low) / parts)
        first = math.ceil(low / step - 1e-9) if tight else math.floor(low / step + 1e-9)
        last = math.floor(high / step + 1e-9) if tight else math.ceil(high / step - 1e-9)
        ticks = tuple(step * place for place in range(first, last + 1))
        if not tight:
            low, high = step * first, step * last
        return cls(low, high, ticks, False, label, text)


def _step(least: float) -> float:
    """Returns the smallest of 1, 2, 2.5 and 5 times a power of ten that is at least this."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(part * power for part in (1, 2, 2.5, 5, 10) if part * power >= least * 0.999)


def _log_ticks(low: float, high: float, parts: int) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= parts + 2:
            break
    if len(ticks) >= 3:
        return tuple(ticks[:: max(1, -(-len(ticks) // (parts + 2)))])
    step = _step((high - low) / parts)
    places = range(math.ceil(low / step), math.floor(high / step) + 1)
    return tuple(step * place for place in places if place > 0)
