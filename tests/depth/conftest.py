"""The contract suite's small models and ragged prompts."""

import torch

from tests.contract.conftest import FAMILIES, family, one_thread, prompts, target  # noqa: F401


def rows(ids, mask):
    """The real tokens of every row."""
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def model_of(name, layers=4, seed=1):
    torch.manual_seed(seed)
    return FAMILIES[name](layers).eval()
