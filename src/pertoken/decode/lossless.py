"""lossless(policy): any policy becomes the drafter of its own full model, verified exactly.

The model with the policy attached guesses, the model without it verifies: the output is that of the full model, the
policy only decides how many guesses are right. (Self-speculative decoding, arXiv 2309.08168, for any policy.)
"""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.core.card import Paper, method
from pertoken.core.policy import Policy
from pertoken.decode.dyspec import DySpec


@method(
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper("Draft & Verify: Lossless LLM Acceleration via Self-Speculative Decoding", "2309.08168"),
    reads={"logits"},
    writes={"guesses"},
    needs={"policy"},
    baselines=("full",),
)
@dataclass(frozen=True)
class Lossless(DySpec):
    """A policy on the target itself as the drafter of the target, in a dynamic tree."""

    size: int = 16
    ngrams: int = 0


def lossless(policy: Policy, size: int = 16, **options: object) -> Lossless:
    """The decoder that drafts with `policy` attached to the model and verifies with the model as it is.

    options: any field of `DySpec`. Raises `TypeError` if `policy` is not a policy.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"lossless needs a policy (such as SkipLayers), got {type(policy).__name__}")
    return Lossless(draft=policy, size=size, **options)  # type: ignore[arg-type]
