"""Claims of lossless: a policy that changes the output, as drafter of its own model, no longer does."""

from __future__ import annotations

from typing import Any

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.budget import Budget
from pertoken.decode.lossless import lossless
from pertoken.depth.skip_layers import SkipLayers


def skipping(models: suite.Pair) -> Any:
    return lossless(SkipLayers(Budget(fraction=0.5)), size=4, economy=False)


@claim(
    "lossless",
    claim="Greedy ids with half of the layers as drafter equal plain generation's in ragged batches of 8 (fp32)",
    metric="share of prompts with identical ids",
    expected="== 1",
    compare="value",
)
def identical(bench: Bench) -> Measurement:
    return suite.identical(bench, skipping, 8)


@claim(
    "lossless",
    claim="lossless(SkipLayers) samples the target's law at temperature 1.0",
    metric="p-value of a chi-square test over 125 outcomes",
    expected=">= 0.001",
    compare="value",
)
def law(bench: Bench) -> Measurement:
    return suite.law_test(bench, skipping, 1.0)
