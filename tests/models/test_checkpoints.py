"""Masked-diffusion checkpoints in their public namings: read, run and saved; what does not fit is named."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import embedding, linear, silu
from transformers import PreTrainedTokenizerFast

from pertoken.core.errors import BadRequest
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.loop import Denoise
from pertoken.denoise.threshold import Threshold
from pertoken.models import load
from tests.denoise.conftest import alone, fill, prompts

torch.set_num_threads(1)
WIDTH, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY, MASK = 32, 48, 4, 2, 3, 64, 60
EPS, THETA = 1e-5, 500000.0
END = {"llada": 1, "Dream": MASK - 2}

# The public config.json of LLaDA-8B-Instruct, with small numbers in the place of large ones.
LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": WIDTH,
    "embedding_dropout": 0.0,
    "embedding_size": VOCABULARY,
    "eos_token_id": 1,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 128,
    "mlp_hidden_size": INNER,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "n_layers": LAYERS,
    "pad_token_id": 1,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": EPS,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": THETA,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": VOCABULARY - 2,
    "weight_tying": False,
}
DREAM = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": MASK - 1,
    "eos_token_id": MASK - 2,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "mask_token_id": MASK,
    "max_position_embeddings": 128,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pad_token_id": MASK - 2,
    "rms_norm_eps": EPS,
    "rope_scaling": None,
    "rope_theta": THETA,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
SIZES = {
    "q": (WIDTH, WIDTH),
    "k": (KV_HEADS * WIDTH // HEADS, WIDTH),
    "v": (KV_HEADS * WIDTH // HEADS, WIDTH),
    "o": (WIDTH, WIDTH),
    "gate": (INNER, WIDTH),
    "up": (INNER, WIDTH),
    "down": (WIDTH, INNER),
    "norm_in": (WIDTH,),
    "norm_mid": (WIDTH,),
}
SPELLING = {
    "llada": {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "attn_out",
        "gate": "ff_proj",
        "up": "up_proj",
        "down": "ff_out",
        "norm_in": "attn_norm",
        "norm_mid": "ff_norm",
        "embed": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
        "block": "model.transformer.blocks",
    },
    "Dream": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "norm_in": "input_layernorm",
        "norm_mid": "post_attention_layernorm",
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "block": "model.layers",
    },
}


def weights(kind: str, tied: bool, biased: bool) -> dict[str, torch.Tensor]:
    """Random tensors under the names of the kind."""
    generator, say = torch.Generator().manual_seed(7), SPELLING[kind]

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3 + (1.0 if shape == (WIDTH,) else 0.0)

    found = {f"{say['embed']}.weight": drawn(VOCABULARY, WIDTH), f"{say['norm']}.weight": drawn(WIDTH)}
    if not tied:
        found[f"{say['head']}.weight"] = drawn(VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        for part, shape in SIZES.items():
            found[f"{say['block']}.{layer}.{say[part]}.weight"] = drawn(*shape)
            if biased and part in "qkv":
                found[f"{say['block']}.{layer}.{say[part]}.bias"] = drawn(shape[0])
    return found


def written(path, kind="llada", tied=False, shards=1, biased=None, change=None, drop=(), extra=None, **fields):
    """A directory as the hub holds it: config, tokenizer, weights, and remote code that must not run."""
    biased = kind == "Dream" if biased is None else biased
    config = (LLADA if kind == "llada" else DREAM) | fields
    config["weight_tying" if kind == "llada" else "tie_word_embeddings"] = tied
    if kind == "llada" and biased:
        config["include_qkv_bias"] = True
    tensors = {name: value for name, value in weights(kind, tied, biased).items() if name not in drop}
    tensors |= extra or {}
    for name, value in (change or {}).items():
        tensors[name] = value
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    for name in ("llada", "dream"):
        (path / f"modeling_{name}.py").write_text("raise SystemExit('remote code ran')\n")
        (path / f"configuration_{name}.py").write_text("raise SystemExit('remote code ran')\n")
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        names, where = sorted(tensors), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            mine = names[shard::shards]
            save_file({name: tensors[name] for name in mine}, path / file, metadata={"format": "pt"})
            where |= dict.fromkeys(mine, file)
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer_files(path, kind)
    return path, tensors


def tokenizer_files(path, kind):
    if kind == "llada":
        plain = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t2"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="t1", unk_token="t2").save_pretrained(path)
        return
    pieces = [chr(ord("a") + i) for i in range(26)] + ["ab"] + [f"unused{i}" for i in range(27, MASK - 2)]
    (path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (path / "merges.txt").write_text("#version: 0.2\na b\n")
    special = {str(MASK - 2): "<|endoftext|>", str(MASK - 1): "<|beginoftext|>", str(MASK): "<|mask|>"}
    added = {i: {"content": s, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                 "single_word": False} for i, s in special.items()}  # fmt: skip
    about = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "tokenizer_class": "DreamTokenizer",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    (path / "tokenization_dream.py").write_text("raise SystemExit('remote code ran')\n")


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def turned(x):
    """Rotary positions on `[token, head, dim]`: dimensions d and d + dim / 2 turn by token * theta^(-2 d / dim)."""
    dim, out = x.shape[-1], torch.empty_like(x)
    for token in range(x.shape[0]):
        for d in range(dim // 2):
            angle = token * THETA ** (-2 * d / dim)
            one, other = x[token, :, d], x[token, :, d + dim // 2]
            out[token, :, d] = one * math.cos(angle) - other * math.sin(angle)
            out[token, :, d + dim // 2] = other * math.cos(angle) + one * math.sin(angle)
    return out


def naive(kind, tensors, ids):
    """Logits `[token, vocabulary]` of one row from the definition of the architecture: everybody reads everybody."""
    say = SPELLING[kind]
    tensors = {name: value.double() for name, value in tensors.items()}

    def lin(x, layer, part):
        name = f"{say['block']}.{layer}.{say[part]}"
        return linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    hidden = embedding(ids, tensors[f"{say['embed']}.weight"])
    tokens, dim = len(ids), WIDTH // HEADS
    for layer in range(LAYERS):
        normed = rms(hidden, tensors[f"{say['block']}.{layer}.{say['norm_in']}.weight"])
        query = turned(lin(normed, layer, "q").view(tokens, HEADS, dim))
        key = turned(lin(normed, layer, "k").view(tokens, KV_HEADS, dim))
        value = lin(normed, layer, "v").view(tokens, KV_HEADS, dim)
        mixed = torch.zeros_like(query)
        for head in range(HEADS):
            mine = head * KV_HEADS // HEADS
            chances = (query[:, head] @ key[:, mine].T / math.sqrt(dim)).softmax(-1)
            mixed[:, head] = chances @ value[:, mine]
        hidden = hidden + lin(mixed.flatten(1), layer, "o")
        normed = rms(hidden, tensors[f"{say['block']}.{layer}.{say['norm_mid']}.weight"])
        hidden = hidden + lin(silu(lin(normed, layer, "gate")) * lin(normed, layer, "up"), layer, "down")
    head = tensors.get(f"{say['head']}.weight", tensors[f"{say['embed']}.weight"])
    return linear(rms(hidden, tensors[f"{say['norm']}.weight"]), head)


KINDS = [("llada", False), ("llada", True), ("Dream", True)]


@pytest.mark.parametrize(("kind", "biased"), KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_logits_are_those_of_the_architecture(tmp_path, kind, biased, tied, shards):
    path, tensors = written(tmp_path, kind, tied, shards, biased)
    model, _ = load(str(path), "fp32")
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = model(ids).logits
    for row in range(2):
        expected = naive(kind, tensors, ids[row])
        assert (ours[row] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert model.config.is_causal is False and model.config.mask_token_id == MASK
    assert model.config.prediction_shift == (1 if kind == "Dream" else 0)
    assert model.generation_config.eos_token_id == END[kind]


@pytest.mark.parametrize(("kind", "biased"), KINDS)
def test_the_loop_fills_a_canvas_and_rows_do_not_depend_on_their_batch(tmp_path, kind, biased):
    model, _ = load(str(written(tmp_path, kind, biased=biased)[0]), "fp32")
    model.generation_config.eos_token_id = None
    inputs, decoder = prompts(7, 3, 12), Denoise(Threshold(0.3), DualCache(), block=8)
    together = fill(model, inputs, decoder)
    assert not (together == MASK).any()
    for row in range(3):
        assert fill(model, alone(inputs, row), decoder)[0].tolist() == together[row].tolist()


@pytest.mark.parametrize("kind", ["llada", "Dream"])
def test_the_loop_commits_what_the_definition_says(tmp_path, kind):
    """One position per step, the most confident first, from the naive forward alone."""
    path, tensors = written(tmp_path, kind)
    model, _ = load(str(path), "fp32")
    model.generation_config.eos_token_id = None
    inputs, shift = prompts(5), int(kind == "Dream")
    canvas = torch.cat([inputs["input_ids"][0], torch.full((6,), MASK)])
    while (canvas == MASK).any():
        logits = naive(kind, tensors, canvas)
        logits[:, MASK] = -torch.inf
        open_ = (canvas == MASK).nonzero().flatten()
        chances = logits[open_ - shift].softmax(-1)
        best = int(chances.amax(-1).argmax())
        canvas[open_[best]] = int(chances[best].argmax())
    assert fill(model, inputs, Denoise(block=6), length=6)[0].tolist() == canvas[5:].tolist()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llada", "Dream"])
def test_what_is_saved_loads_again_without_this_reader(tmp_path, kind, tied):
    (tmp_path / "a").mkdir()
    model, tokenizer = load(str(written(tmp_path / "a", kind, tied, shards=2)[0]), "bf16")
    assert next(model.parameters()).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    again, _ = load(str(tmp_path / "b"))
    assert again.config.model_type in ("llama", "qwen2")
    for field in ("is_causal", "mask_token_id", "prediction_shift", "eos_token_id", "tie_word_embeddings"):
        assert getattr(again.config, field) == getattr(model.config, field), field
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert next(again.parameters()).dtype == torch.bfloat16


def test_the_stored_dtype_is_kept(tmp_path):
    half = {name: value.bfloat16() for name, value in weights("llada", False, False).items()}
    model, _ = load(str(written(tmp_path, change=half)[0]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["llada", "Dream"])
def test_the_tokenizer_is_read_without_remote_code(tmp_path, kind):
    _, tokenizer = load(str(written(tmp_path, kind)[0]), "fp32")
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == END[kind]
    text, ids = ("t5 t7 t9", [5, 7, 9]) if kind == "llada" else ("abc<|mask|>", [26, 2, MASK])
    assert tokenizer(text)["input_ids"] == ids


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"drop": ("model.transformer.blocks.1.up_proj.weight",)},
            r"lacks model\.transformer\.blocks\.1\.up_proj\.weight",
        ),
        ({"drop": ("model.transformer.ff_out.weight",)}, r"lacks model\.transformer\.ff_out\.weight"),
        ({"extra": {"model.transformer.wpe.weight": torch.zeros(3)}}, r"holds unknown model\.transformer\.wpe\.weight"),
        (
            {"change": {"model.transformer.blocks.0.k_proj.weight": torch.zeros(8, WIDTH)}},
            r"blocks\.0\.k_proj\.weight \(\[8, 32\] instead of \[16, 32\]\)",
        ),
        ({"kind": "Dream", "biased": False}, r"lacks model\.layers\.0\.self_attn\.k_proj\.bias.* and 5 more"),
        ({"block_type": "sequential"}, "block_type='sequential'.*block_type='llama'"),
        ({"block_type": "absent"}, "block_type='sequential'"),
        ({"alibi": True}, "alibi=True"),
        ({"include_bias": True}, "include_bias=True"),
        ({"mask_token_id": "absent"}, "lacks mask_token_id"),
        ({"kind": "Dream", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"kind": "Dream", "architectures": ["DreamForCausalLM"]}, "DreamForCausalLM.*DreamModel"),
        ({"architectures": ["LLaDAMoEModelLM"]}, "LLaDAMoEModelLM.*LLaDA-8B"),
        ({"model_type": "llada2_moe"}, "'llada2_moe' is unknown.*llada.*Dream"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(tmp_path, options, says):
    path, _ = written(tmp_path, **options)
    with pytest.raises(BadRequest, match=says):
        load(str(path), "fp32")
