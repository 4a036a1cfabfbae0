"""Claims that lossless decoders make in the same words: ids are plain generation's, samples the target's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.suite import Pair, identical, identical_in_families, law_test, near_ties

Make = Callable[[Pair], Any]
"""A decoder for a target and its draft."""


def claim_identical(method: str, how: str, measure: Callable[[Bench], Measurement], shown: bool = False) -> None:
    """Greedy ids on held-out prompts; how: many of them together, as the sentence says it."""
    claim(
        method,
        claim=f"Greedy ids equal plain generation's on every held-out prompt{how} (fp32)",
        metric="share of prompts with identical ids",
        expected="== 1",
        compare="value",
        shown=shown,
    )(measure)


def claim_exact(method: str, make: Make, small: Make) -> None:
    """Greedy ids on held-out prompts, alone and in batches, in bf16, and of a `small` one on random models."""
    claim_identical(method, ", one at a time", partial(identical, make=make, batch=1))
    claim_identical(method, " in ragged batches of 8", partial(identical, make=make, batch=8), shown=True)
    claim(
        method,
        claim="Greedy ids equal plain generation's on random Llama, Qwen3, GPT-2, Mistral, Gemma models, batch 1 and 8",
        metric="share of prompts with identical ids",
        expected="== 1",
        compare="value",
    )(partial(identical_in_families, make=small))
    claim(
        method,
        claim="In bf16 the ids are plain generation's up to near-ties of the target",
        metric="share of prompts identical or parting at a near-tie",
        expected=">= 0.95",
        compare="value",
    )(partial(near_ties, make=make))


def claim_laws(method: str, makers: Mapping[str, Make], temperatures: Sequence[float]) -> None:
    """Samples at each temperature; makers: by what the sentence calls it."""
    for label, make in makers.items():
        for temperature in temperatures:
            claim(
                method,
                claim=f"{label} samples the target's law at temperature {temperature}",
                metric="p-value of a chi-square test over 125 outcomes",
                expected=">= 0.001",
                compare="value",
            )(partial(law_test, make=make, temperature=temperature))
