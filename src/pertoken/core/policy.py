"""Policy: a pure rule from what can be seen to what each token gets.

A policy is a frozen dataclass with a budget. It decides; it never touches a model. How a decision is carried out is its
folder's mechanism: an abstract subclass that implements `install` with the attachment's tools, shared by every policy
of the folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from pertoken.core.budget import Budget
from pertoken.core.decision import Decision

if TYPE_CHECKING:
    from pertoken.core.attach import Attachment


@dataclass(frozen=True)
class View:
    """What a policy may look at when it decides.

    valid `[batch, token]` bool: which tokens of this forward are real; layers: depth of the model; signals: tensors
    with a leading `[batch, token]` that the mechanism measured, by name (see `core.signals`); tree: the tokens are the
    nodes of a token tree, not a text; positions `[batch, token]` int: the place of each token in its row; prompt
    `[batch]` int: how many tokens of each row were given and not generated. The last two are None where whatever runs
    the model does not say.
    """

    valid: Tensor
    layers: int
    signals: dict[str, Tensor] = field(default_factory=dict)
    tree: bool = False
    positions: Tensor | None = None
    prompt: Tensor | None = None


class Policy(ABC):
    """Base of every attachable policy. `reads` and `writes` name what it looks at and changes; saves: what a smaller
    budget makes smaller at once, "operations" of a forward or "memory" held after it, or "nothing" where it lets more
    tokens have more operations than without the policy."""

    budget: Budget
    reads: frozenset[str]
    writes: frozenset[str]
    saves: ClassVar[str] = "operations"

    @abstractmethod
    def decide(self, view: View) -> Decision:
        """The decision for the tokens in view, under the budget. Pure: same view, same decision."""

    @abstractmethod
    def install(self, model: Any, attachment: Attachment) -> None:
        """Put the folder's mechanism on the model, through the attachment's tools only."""
