"""A text read at once, and column by column behind a cache."""

import torch


def logits(model, ids, mask, **options):
    return model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **options).logits


def continued(model, ids, mask, cut):
    """Logits of the columns up to `cut` at once, and then of one column at a time."""
    found, cache = [], None
    with torch.inference_mode():
        for start, stop in [(0, cut), *((i, i + 1) for i in range(cut, ids.shape[1]))]:
            out = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, 1)
