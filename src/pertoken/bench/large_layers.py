"""Decoding steps of layers as wide as those of a model of a billion weights, with weights by chance: what they cost."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pertoken.bench.claims import Bench
from pertoken.core.attach import attach
from pertoken.core.cost import timed
from pertoken.core.policy import Policy

LAYERS, HEADS, KEY_HEADS, DIM = 2, 32, 8, 64
WARM = 3  # steps that are not counted
LARGE = f"{LAYERS} layers, {HEADS} heads, {KEY_HEADS} key heads of {DIM}, fp32, random weights, batch 1"


def raced(
    bench: Bench, sides: dict[str, Policy | None], length: int, steps: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Speed over the side "dense" of each side, which takes a step in turn with the others behind `length` random keys;
    and what was measured."""
    torch.manual_seed(bench.seed)
    config: Any = LlamaConfig(
        vocab_size=128,
        hidden_size=HEADS * DIM,
        intermediate_size=8192,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=DIM,
        max_position_embeddings=2 * length,
    )
    model, read = LlamaForCausalLM(config).eval(), DynamicCache(config=config)
    for layer in range(LAYERS):
        read.update(torch.randn(1, KEY_HEADS, length, DIM), torch.randn(1, KEY_HEADS, length, DIM), layer)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with ExitStack() as stack:
        running = {}
        for name, policy in sides.items():
            own = copy.deepcopy(model)
            if policy is not None:
                stack.enter_context(attach(own, policy))
            running[name] = own, copy.deepcopy(read)
        for step in range(WARM + steps):
            for name, (own, cache) in running.items():
                bench.status(f"{length} tokens, step {step}: {name}")
                with timed() as cost, torch.inference_mode():
                    own(input_ids=torch.tensor([[step]]), past_key_values=cache, use_cache=True)
                seconds[name].append(cost.seconds)
    counted = {name: one[WARM:] for name, one in seconds.items()}
    speeds = {name: median(a / b for a, b in zip(counted["dense"], one, strict=True)) for name, one in counted.items()}
    ms = {name: 1000 * median(one) for name, one in counted.items()}
    return speeds, {"speed over dense": speeds, "ms per step": ms, "steps": steps}
