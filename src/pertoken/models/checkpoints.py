"""Directories of masked-diffusion models that transformers has no class for, read into the classes that it has.

- `model_type: "llada"` (LLaDA-8B, LLaDA-1.5; Nie et al., arXiv 2502.09992): a Llama in OLMo's naming. `ff_proj` is
  the gate and `up_proj` what it multiplies; `ff_out` is the way down in a block and the head at the top; biases are
  none, or on query, key and value only (`include_qkv_bias`), which makes it a Qwen2. The output at i predicts token i.
- `model_type: "Dream"` (Dream-7B, Dream-Coder, DiffuCoder; Ye et al., arXiv 2508.15487): a Qwen2 under its own name.
  The output at i - 1 predicts token i.

Both read in all directions: `config.is_causal` is False. The code that lies beside the weights is never run.
transformers loads the weights, shard by shard; `save_pretrained` then writes a Llama or Qwen2 that needs nothing of
this file.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pertoken.core.errors import BadRequest

SHOWN = 4  # names in an error


class Reader(ABC):
    """What one kind of directory holds, said in transformers' terms."""

    architectures: ClassVar[tuple[str, ...]]
    examples: ClassVar[str]
    needed: ClassVar[tuple[str, ...]]
    fixed: ClassVar[dict[str, tuple[Any, Any]]]  # fields that must have one value, and what their absence means
    names: ClassVar[dict[str, str]]  # prefixes of tensors: as stored -> transformers'; N is the layer

    @abstractmethod
    def model(self, about: dict[str, Any]) -> tuple[type, Any]:
        """The class and configuration of what config.json describes."""

    @abstractmethod
    def tokenizer(self, path: str, config: Any, local: bool) -> Any: ...

    def check(self, about: dict[str, Any], name: str) -> None:
        """Raises `BadRequest` for a config.json that says something which this reader does not render."""
        kind = about.get("model_type")
        found = about.get("architectures") or [self.architectures[0]]
        if found[0] not in self.architectures:
            raise BadRequest(
                f"{name}: model_type {kind!r} with architecture {found[0]!r} cannot be read, only "
                f"{' or '.join(self.architectures)}. {known()}"
            )
        missing = [field for field in self.needed if about.get(field) is None]
        if missing:
            raise BadRequest(f"{name}: config.json lacks {', '.join(missing)}, which model_type {kind!r} needs")
        for field, (wanted, default) in self.fixed.items():
            value = about.get(field, default)
            if value != wanted:
                raise BadRequest(
                    f"{name}: config.json says {field}={value!r}; a checkpoint of model_type {kind!r} can be read only "
                    f"with {field}={wanted!r}"
                )

    def key_mapping(self) -> dict[str, str]:
        """Regular expressions and replacements, as `from_pretrained` takes them."""
        return {
            "^" + re.escape(old).replace("N", r"(\d+)") + r"\.": new.replace("N", r"\1") + "."
            for old, new in self.names.items()
        }

    def stored(self, target: str) -> str:
        """The name in the checkpoint of a parameter of the model."""
        for old, new in self.names.items():
            found = re.fullmatch(re.escape(new).replace("N", r"(\d+)") + r"\.(\w+)", target)
            if found:
                *layer, leaf = found.groups()
                return f"{old.replace('N', layer[0]) if layer else old}.{leaf}"
        return target


class LLaDA(Reader):
    architectures = ("LLaDAModelLM",)
    examples = "LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5"
    needed = ("d_model", "n_heads", "n_layers", "vocab_size", "mask_token_id")
    fixed: ClassVar = {
        "block_type": ("llama", "sequential"),
        "layer_norm_type": ("rms", "default"),
        "activation_type": ("silu", "swiglu"),
        "rope": (True, False),
        "alibi": (False, False),
        "attention_layer_norm": (False, False),
        "layer_norm_with_affine": (True, True),
        "include_bias": (False, False),
        "input_emb_norm": (False, False),
        "scale_logits": (False, False),
        "block_group_size": (1, 1),
    }
    names: ClassVar = {
        "model.transformer.wte": "model.embed_tokens",
        "model.transformer.ln_f": "model.norm",
        "model.transformer.ff_out": "lm_head",
        "model.transformer.blocks.N.attn_norm": "model.layers.N.input_layernorm",
        "model.transformer.blocks.N.ff_norm": "model.layers.N.post_attention_layernorm",
        "model.transformer.blocks.N.q_proj": "model.layers.N.self_attn.q_proj",
        "model.transformer.blocks.N.k_proj": "model.layers.N.self_attn.k_proj",
        "model.transformer.blocks.N.v_proj": "model.layers.N.self_attn.v_proj",
        "model.transformer.blocks.N.attn_out": "model.layers.N.self_attn.o_proj",
        "model.transformer.blocks.N.ff_proj": "model.layers.N.mlp.gate_proj",
        "model.transformer.blocks.N.up_proj": "model.layers.N.mlp.up_proj",
        "model.transformer.blocks.N.ff_out": "model.layers.N.mlp.down_proj",
    }

    def model(self, about):
        from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

        heads, width = about["n_heads"], about["d_model"]
        kv_heads = about.get("n_kv_heads") or (1 if about.get("multi_query_attention") else heads)
        shape = {
            "vocab_size": about.get("embedding_size") or about["vocab_size"],
            "hidden_size": width,
            "intermediate_size": about.get("mlp_hidden_size") or about.get("mlp_ratio", 4) * width,
            "num_hidden_layers": about["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": about.get("max_sequence_length", 1024),
            "rms_norm_eps": about.get("rms_norm_eps", 1e-5),
            "rope_parameters": {"rope_type": "default", "rope_theta": about.get("rope_theta", 10000.0)},
            "tie_word_embeddings": about.get("weight_tying", True),
        }
        if about.get("include_qkv_bias"):
            return Qwen2ForCausalLM, Qwen2Config(**shape, **special(about, 0))
        return LlamaForCausalLM, LlamaConfig(**shape, **special(about, 0))

    def tokenizer(self, path, config, local):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, config=config, local_files_only=local, padding_side="left")


class Dream(Reader):
    architectures = ("DreamModel",)
    examples = "Dream-v0-Base-7B, Dream-v0-Instruct-7B, Dream-Coder, DiffuCoder"
    needed = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "mask_token_id",
    )
    fixed: ClassVar = {"use_sliding_window": (False, False), "hidden_act": ("silu", "silu")}
    names: ClassVar = {}

    def model(self, about):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        scaling = dict(about.get("rope_scaling") or {})
        scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
        config = Qwen2Config(
            **{field: about[field] for field in self.needed if field != "mask_token_id"},
            num_key_value_heads=about.get("num_key_value_heads") or about["num_attention_heads"],
            max_position_embeddings=about.get("max_position_embeddings", 32768),
            rms_norm_eps=about.get("rms_norm_eps", 1e-6),
            rope_parameters=scaling | {"rope_theta": about.get("rope_theta", 10000.0)},
            tie_word_embeddings=about.get("tie_word_embeddings", False),
            **special(about, 1),
        )
        return Qwen2ForCausalLM, config

    def tokenizer(self, path, config, local):
        """Dream's own tokenizer class is Qwen2's with other special tokens, which lie in tokenizer_config.json."""
        from transformers import Qwen2Tokenizer

        return Qwen2Tokenizer.from_pretrained(path, local_files_only=local, padding_side="left")


READERS: dict[str, Reader] = {"llada": LLaDA(), "Dream": Dream()}


def special(about: dict[str, Any], shift: int) -> dict[str, Any]:
    """What makes a configuration that of a diffusion model."""
    tokens = {name: about.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")}
    stored = about.get("dtype") or about.get("torch_dtype")
    return {"is_causal": False, "prediction_shift": shift, **tokens, **({"dtype": stored} if stored else {})}


def known() -> str:
    """A sentence that lists what can be read."""
    kinds = "; ".join(f"{kind} ({reader.examples})" for kind, reader in READERS.items())
    return f"Diffusion checkpoints that are read without their remote code: {kinds}"


def reader_for(about: dict[str, Any], name: str) -> Reader | None:
    """The reader of a config.json, None where transformers has a class; raises `BadRequest` where neither can."""
    from transformers import CONFIG_MAPPING

    kind = about.get("model_type")
    if kind in READERS:
        READERS[kind].check(about, name)
        return READERS[kind]
    if kind is not None and kind not in CONFIG_MAPPING:
        raise BadRequest(f"{name}: model_type {kind!r} is unknown to transformers and to pertoken. {known()}")
    return None


def read(reader: Reader, path: str, about: dict[str, Any], dtype: Any, local: bool) -> Any:
    """The model in the directory or hub repository `path`; raises `BadRequest` for tensors that do not fit."""
    cls, config = reader.model(about)
    model, report = cls.from_pretrained(  # type: ignore[attr-defined]
        path,
        config=config,
        dtype=dtype,
        key_mapping=reader.key_mapping() or None,
        local_files_only=local,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    faults = {
        "lacks": [reader.stored(key) for key in report["missing_keys"]],
        "holds unknown": [reader.stored(key) for key in report["unexpected_keys"] if not key.endswith("inv_freq")],
        "has other shapes than config.json says for": [
            f"{reader.stored(key)} ({list(found)} instead of {list(wanted)})"
            for key, found, wanted in report["mismatched_keys"]
        ],
    }
    said = [f"{what} {listed(names)}" for what, names in faults.items() if names]
    if said:
        raise BadRequest(f"{path}: the checkpoint {', '.join(said)}. Give the whole, unchanged directory")
    vars(model).pop("_weight_conversions", None)  # or save_pretrained would write the old names beside the new config
    return model


def listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(sorted(names)[:SHOWN]) + (f" and {more} more" if more > 0 else "")
