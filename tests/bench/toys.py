"""A tiny model, its tokenizer, and decoders simple enough to know what they cost."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pertoken.core.decision import Keep
from pertoken.core.trace import Trace

END = "<end>"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, padding on the left."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({END: 0} | {letter: i + 1 for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, padding_side="left")


def model(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=96,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@dataclass
class Stats:
    steps: int = 0


@dataclass
class Greedy:
    """A decoder without a cache: one full forward per token; `wrong` makes it commit another token than the best."""

    wrong: bool = False
    stats: Stats = field(default_factory=Stats)
    trace: Trace | None = None
    calls: int = 0

    def __call__(self, model, input_ids, generation_config=None, **more):
        attention_mask = more.get("attention_mask")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.stats, self.calls = Stats(), self.calls + 1
        width = generation_config.max_length
        while input_ids.shape[1] < width:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids, attention_mask=attention_mask, position_ids=positions).logits[:, -1]
            token = logits.topk(2, -1).indices[:, int(self.wrong)][:, None]
            ended = (input_ids[:, -1:] == 0) & (attention_mask[:, -1:] == 0)
            token = token.masked_fill(ended, 0)
            input_ids = torch.cat([input_ids, token], -1)
            attention_mask = torch.cat([attention_mask, (token != 0).long()], -1)
            self.stats.steps += 1
            if self.trace is not None:
                valid = torch.ones(len(token), 1, dtype=torch.bool)
                self.trace.record("step", Keep(valid, valid))
        return input_ids

    @contextmanager
    def record(self):
        self.trace = Trace()
        try:
            yield self.trace
        finally:
            self.trace = None
