"""Everything that is trained beside a zoo model, some of it with a copy of the model itself, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pertoken.zoo import WEIGHTS
from pertoken.zoo.duo import Routing
from pertoken.zoo.on_demand import kept_in
from pertoken.zoo.skipping import Skipping
from pertoken.zoo.stopping import Stopping
from pertoken.zoo.thinking import ALWAYS, ONCE, Thinking
from pertoken.zoo.tuning import Tuning, tune

TUNINGS: dict[str, Tuning] = {
    "code-duo": Routing(),
    "code-duo-after": Routing(steps=210, first=210, rank=0, after="code-skip-full"),
    "code-skip": Skipping(steps=150),
    "code-skip-random": Skipping(steps=150, schedule="random"),
    "code-skip-full": Skipping(steps=150, schedule="full"),
    "code-stop": Stopping(steps=150),
    "code-stop-heads": Stopping(steps=400, head_steps=250, own_heads=True, layers=(3, 6, 9)),
    "reasoning-think": Thinking(),
    "reasoning-think-frozen": Thinking(backbone=0.0),
    "reasoning-think-always": Thinking(steps=Thinking.first, again=ALWAYS),
    "reasoning-think-once": Thinking(steps=Thinking.first, again=ONCE),
}


def tuned(name: str, status: Callable[[str], None] = print) -> Path:
    """Directory of what is trained under a name of `TUNINGS`: the packaged one, or one in the user's cache, trained now
    as far as it is not."""
    if (WEIGHTS / name / "config.json").exists():
        return WEIGHTS / name
    return tune(name, kept_in() / name, TUNINGS[name], status=status)
