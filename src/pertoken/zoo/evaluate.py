"""How good the zoo is on files it never saw: loss, bits per byte, agreement of draft and target, and whether it
loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pertoken.zoo import corpus
from pertoken.zoo.ngram_model import NGramModel

PROMPTS = Path(__file__).with_name("prompts.jsonl")


def prompts(count: int | None = None) -> list[str]:
    """Held-out prompts: excerpts of about 128 tokens, each from the start of a line."""
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return texts[:count]


@torch.inference_mode()
def losses(model: Any, stream: np.ndarray, length: int = 512, exits: tuple[int, ...] = ()) -> dict[str, float]:
    """Nats per token over all non-overlapping windows of the stream: of the model, and of its early exits."""
    sums, count = dict.fromkeys(["loss", *(f"exit_{e}" for e in exits)], 0.0), 0
    windows = corpus.windows(stream, length, 0, 1)
    for start in range(0, len(windows), 8):
        batch = torch.from_numpy(windows[start : start + 8].astype(np.int64))
        labels = batch[:, 1:].flatten()
        out = model(batch[:, :-1], output_hidden_states=bool(exits), use_cache=False)
        sums["loss"] += float(F.cross_entropy(out.logits.flatten(0, 1).float(), labels, reduction="sum"))
        for e in exits:
            logits = model.lm_head(model.model.norm(out.hidden_states[e]))
            sums[f"exit_{e}"] += float(F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum"))
        count += labels.numel()
    return {name: total / count for name, total in sums.items()}


@torch.inference_mode()
def agreement(one: Any, other: Any, stream: np.ndarray, length: int = 512, windows: int = 128) -> float:
    """Share of positions of the stream at which both models' most likely next token is the same."""
    same = total = 0
    for ids in corpus.windows(stream, length, 0, 1)[:windows]:
        batch = torch.from_numpy(ids[None, :-1].astype(np.int64))
        tokens = [model(batch, use_cache=False).logits.argmax(-1) for model in (one, other)]
        same, total = same + int((tokens[0] == tokens[1]).sum()), total + tokens[0].numel()
    return same / total


def repeated_four_grams(outputs: list[list[int]]) -> float:
    """Share of the 4-grams of each output that occurred earlier in it, over all outputs."""
    repeated = total = 0
    for tokens in outputs:
        grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return repeated / max(total, 1)


@torch.inference_mode()
def greedy_outputs(model: Any, tokenizer: Any, texts: list[str], new: int = 128, batch: int = 8) -> list[list[int]]:
    """New ids of plain greedy generation for each prompt, to the end of text."""
    outputs = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            end = model.config.eos_token_id
            outputs.append(row[: row.index(end)] if end in row else row)
    return outputs


def evaluate(target: str, draft: str, status: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Every figure of a target and its draft (zoo names), on the held-out files of the running interpreter."""
    from pertoken.models.adapter import adapter_for
    from pertoken.models.load import load
    from pertoken.models.stack import best_stack
    from pertoken.models.timing import step_time

    (model, tokenizer), (small, _) = load(f"zoo:{target}", "fp32"), load(f"zoo:{draft}", "fp32")
    texts = list(corpus.split_texts("heldout").values())
    backend = tokenizer.backend_tokenizer
    stream = corpus.token_stream(backend, texts)
    bytes_per_token = sum(len(t.encode()) for t in texts) / len(stream)
    status("n-gram model")
    train = corpus.token_stream(backend, list(corpus.split_texts("train").values()))
    five = NGramModel(train).loss(stream, len(tokenizer))
    status(f"held-out loss of {target}")
    big = losses(model, stream, exits=tuple(range(1, model.config.num_hidden_layers)))
    status(f"held-out loss of {draft}")
    little = losses(small, stream)
    status("agreement and repetition")
    outputs = greedy_outputs(model, tokenizer, prompts())
    named = {target: model, draft: small}
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in named.items()}

    status("speed")
    milliseconds = {name: 1e3 * step_time(best_stack(adapter_for(m)), 1)(1) for name, m in named.items()}

    def bits(nats: float) -> float:
        return nats / math.log(2) / bytes_per_token

    return {
        "heldout_tokens": len(stream),
        "train_tokens": len(train),
        "bytes_per_token": bytes_per_token,
        "five_gram": {"loss": five, "bits_per_byte": bits(five)},
        target: {"parameters": parameters[target], "bits_per_byte": bits(big["loss"]), **big},
        draft: {"parameters": parameters[draft], "bits_per_byte": bits(little["loss"]), **little},
        "parameter_ratio": parameters[target] / parameters[draft],
        "milliseconds_per_token": milliseconds,
        "time_ratio": milliseconds[target] / milliseconds[draft],
        "greedy_agreement": agreement(model, small, stream),
        "repeated_4_grams": repeated_four_grams(outputs),
        "repeated_4_grams_of_the_files": repeated_four_grams([w.tolist() for w in corpus.windows(stream, 128, 0, 1)]),
        "completion": {"prompt": prompts(3)[2], "output": tokenizer.decode(outputs[2])},
    }
