"""Budget: the one dial of a policy, in the unit that the user means."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Budget:
    """How much a policy may spend. Exactly one unit is set; `Budget.full()` sets none and is the identity.

    tokens: tokens (or keys) kept per sequence; layers: layers run per token; nodes: tree nodes verified per step;
    fraction: share of whatever the policy spends, in [0, 1].
    """

    tokens: int | None = None
    layers: int | None = None
    nodes: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        given = self.units()
        if len(given) > 1:
            raise ValueError(
                f"a budget has one unit, got {', '.join(given)}; set one of tokens, layers, nodes, fraction"
            )
        for unit in given:
            value = getattr(self, unit)
            if unit == "fraction" and not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise ValueError(f"budget fraction={value!r} is outside [0, 1]; give a share such as 0.5")
            if unit != "fraction" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"budget {unit}={value!r} must be a whole number >= 0; for no limit use Budget.full()")

    def units(self) -> list[str]:
        """Names of the units that are set: none for the full budget, else one."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    @classmethod
    def full(cls) -> Budget:
        """No limit: every policy is the identity under it."""
        return cls()

    @property
    def is_full(self) -> bool:
        return not self.units()

    def count(self, total: int) -> int:
        """How many of `total` units may be spent, in [0, total]; a fraction rounds up so that any share spends
        something."""
        if self.is_full:
            return total
        if self.fraction is not None:
            units = math.ceil(round(self.fraction * total, 9))  # 0.07 * 100 is a little more than 7
            return min(total, max(units, 1 if self.fraction > 0 else 0))
        value = next(v for v in (self.tokens, self.layers, self.nodes) if v is not None)
        return min(total, value)

    def __str__(self) -> str:
        if self.is_full:
            return "full"
        (unit,) = self.units()
        return f"{unit}={getattr(self, unit)}"
