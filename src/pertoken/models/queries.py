"""The queries of a model's own layers, as its attention functions get them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from pertoken.core.attach import swapped
from pertoken.models.adapter import Adapter
from pertoken.models.attention import attention_configs, own_attention

NAME = "pertoken_queries"


@contextmanager
def queries_seen(adapter: Adapter, sink: Callable[[int, Tensor, float | None], None]) -> Iterator[None]:
    """Inside the block every attention of the model calls `sink(layer, scaled queries, cap of the scores)` first.

    Queries are `[row, head, query, head_dim]`, rotated and normalised as the family does. The model's attention runs
    under another name meanwhile; nothing is left on it afterwards.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as TABLE

    usual = adapter.config._attn_implementation

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        sink(module.layer_idx, query * scaling, kwargs.get("softcap"))
        return own_attention(module, usual)(module, query, key, value, mask, **kwargs)

    with ExitStack() as changes:
        TABLE[NAME] = attention
        changes.callback(TABLE.__delitem__, NAME)
        if usual in MASKS.valid_keys():  # else there is no mask, which not every attention takes for a causal one
            AttentionMaskInterface._global_mapping[NAME] = MASKS[usual]
            changes.callback(AttentionMaskInterface._global_mapping.__delitem__, NAME)
        for config in attention_configs(adapter):
            changes.enter_context(swapped(config, "_attn_implementation_internal", NAME))
        yield
