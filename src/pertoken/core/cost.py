"""Cost: what a piece of work really spent, in floating-point operations, bytes and seconds.

Operations come from torch's own counter, which sees every matrix product that runs, attention included. Bytes are those
of weights, counted once per forward (a decoding step reads each weight once), and peak memory where the system reports
it.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


@dataclass
class Cost:
    """seconds: wall clock; flops: multiplications and additions (2 per multiply-add), 0 if not counted."""

    seconds: float = 0.0
    flops: int = 0
    peak_bytes: int = 0


def synchronize(device: torch.device | str = "cpu") -> None:
    """Wait for queued work, so that a clock read next is true."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: the most this process ever held (CPU), or that torch ever allocated (GPU)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@contextmanager
def timed(device: torch.device | str = "cpu") -> Iterator[Cost]:
    """Clock a block; read `.seconds` and `.peak_bytes` after it."""
    cost = Cost()
    synchronize(device)
    start = time.perf_counter()
    try:
        yield cost
    finally:
        synchronize(device)
        cost.seconds = time.perf_counter() - start
        cost.peak_bytes = peak_memory(device)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of attention from the shapes of its inputs: torch's counter does not know its CPU kernel."""
    return sdpa_flop_count(query, key, value)


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations that one call of `work` performs. Slow: never time the same call."""
    cpu_attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        work()
    return counter.get_total_flops()


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of all distinct parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
