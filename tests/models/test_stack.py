"""Both ways of running layers against the model's own forward: every family, ragged prefixes, trees, windows, hooks."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from pertoken.decode import make
from pertoken.decode.tree import Tree, TreeBatch
from pertoken.models.adapter import adapter_for, families
from pertoken.models.context import Context
from pertoken.models.stack import FusedStack, ModuleStack, best_stack, stack_of, weights_version
from tests.contract.conftest import COMMON, FAMILIES, VOCABULARY

torch.set_num_threads(1)
LAYERS = 3
MORE = {
    "qwen2": lambda layers: Qwen2ForCausalLM(
        Qwen2Config(
            **COMMON,
            num_hidden_layers=layers,
            use_sliding_window=True,
            sliding_window=9,
            layer_types=["full_attention"] + ["sliding_attention"] * (layers - 1),
        )
    ),
    "smollm3": lambda layers: SmolLM3ForCausalLM(
        SmolLM3Config(**COMMON, num_hidden_layers=layers, no_rope_layers=[1, 0] * layers)
    ),
    "olmo2": lambda layers: Olmo2ForCausalLM(Olmo2Config(**COMMON, num_hidden_layers=layers)),
    "phi3": lambda layers: Phi3ForCausalLM(Phi3Config(**COMMON, num_hidden_layers=layers, sliding_window=9)),
}
EVERY = FAMILIES | MORE
FUSED = ("llama", "mistral", "qwen2", "qwen3")
WINDOWED = ("mistral", "qwen2", "gemma2", "phi3")
PREFIXES = (14, 3, 1, 11)


def model_of(family, layers=LAYERS, dtype=torch.float32):
    torch.manual_seed(1)
    model = EVERY[family](layers).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # biases start at zero and would not be seen to be lost
            if name.endswith("bias"):
                weight.normal_(0, 0.2)
    return model


def llama(**changes):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**(COMMON | {"num_hidden_layers": LAYERS} | changes))).eval()


def stacks(family, model):
    adapter = adapter_for(model)
    return [ModuleStack(adapter), *([FusedStack(adapter)] if family in FUSED else [])]


def chains():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in PREFIXES]


def some_trees():
    trees = []
    for parents in ([-1, 0, 0, 1, -1, 4, 3], [-1], [], [-1, 0, 1, 2, 3]):
        tree = Tree()
        for node, parent in enumerate(parents):
            tree.add((7 * node + 5 * len(parents)) % (VOCABULARY - 2) + 2, parent)
        trees.append(tree)
    return trees


@torch.inference_mode()
def read_tree(stack, prefixes, trees, poison=False):
    """Logits of roots and nodes `[row, 1 + node, vocabulary]` after reading the prefixes less their last token."""
    context = Context(stack, len(prefixes), 4)
    context.feed([chain[:-1] for chain in prefixes])
    cache = context.cache
    if poison:
        cache._grow(cache.base + 64)
        cache.buffer[:, :, :, :, cache.base :] = torch.nan
        holes = ~cache.valid[:, : cache.base]
        cache.buffer[:, :, :, :, : cache.base].masked_fill_(holes[None, None, :, None, :, None], 1e4)
        assert holes.any()
    batch = TreeBatch.of(trees, torch.device("cpu"))
    last = torch.tensor([len(chain) - 1 for chain in prefixes])
    ids = torch.cat([torch.tensor([[chain[-1]] for chain in prefixes]), batch.tokens], 1)
    positions = last[:, None] + nn.functional.pad(batch.depths, (1, 0))
    hidden = stack.forward(ids, positions, cache, cache.base, batch.allow)
    return stack.logits(hidden).float()


@torch.inference_mode()
def plain(model, ids):
    """The model's own logits after the last of these ids."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def compare(model, prefixes, trees, logits):
    """Largest difference from the model's own forward of each path alone, relative to the largest logit."""
    worst = 0.0
    for row, (prefix, tree) in enumerate(zip(prefixes, trees, strict=True)):
        for node in range(-1, len(tree)):
            expected = plain(model, [*prefix, *(tree.tokens[n] for n in tree.path(node))])
            found = logits[row, node + 1]
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
            assert torch.isfinite(found).all()
    return worst


def test_every_family_with_an_adapter_is_here():
    assert set(EVERY) == set(families())


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("family", EVERY)
def test_ragged_prefix_and_tree_give_the_logits_of_each_path_alone(family, poison):
    model = model_of(family)
    prefixes, trees = chains(), some_trees()
    for stack in stacks(family, model):
        logits = read_tree(stack, prefixes, trees, poison)
        assert compare(model, prefixes, trees, logits) < 2e-5


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_is_felt(family):
    """Past the window the far tokens must not matter; without the window they would: the case above is not vacuous."""
    model = model_of(family, layers=1 if family != "qwen2" else 2)
    wide = copy.deepcopy(model)
    adapter = adapter_for(model)
    assert 9 in [adapter.window(i) for i in range(adapter.depth)]
    (chain, *_), tree = chains(), Tree()
    for stack in stacks(family, model):
        near = read_tree(stack, [chain], [tree])
        stack.windows = [None] * adapter.depth
        far = read_tree(stack, [chain], [tree])
        assert not torch.allclose(near, far, atol=1e-3)
        assert torch.allclose(near[0, 0], plain(wide, chain), atol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_long_prompts_are_read_in_pieces(family, monkeypatch):
    monkeypatch.setattr("pertoken.models.context.CHUNK", 5)
    model = model_of(family, layers=2)
    for stack in stacks(family, model):
        logits = read_tree(stack, chains(), some_trees())
        assert compare(model, chains(), some_trees(), logits) < 2e-5


@pytest.mark.parametrize("family", EVERY)
def test_bf16_is_as_near_as_bf16_can_be(family):
    model = model_of(family, dtype=torch.bfloat16)
    for stack in stacks(family, model):
        logits = read_tree(stack, chains(), some_trees())
        assert compare(model, chains(), some_trees(), logits) < 0.1


@pytest.mark.parametrize("family", EVERY)
def test_states_are_those_of_the_model(family):
    model = model_of(family)
    (chain, *_) = chains()
    with torch.inference_mode():
        expected = model(torch.tensor([chain]), output_hidden_states=True, use_cache=False).hidden_states
        for stack in stacks(family, model):
            states = []
            Context(stack, 1, 8).feed([chain], states)
            assert len(states) == LAYERS
            for mine, theirs in zip(states[:-1], expected[1:-1], strict=True):  # the model norms its last one
                assert torch.allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_the_fused_stack_is_used_exactly_where_it_applies(family):
    model = model_of(family)
    stack = best_stack(adapter_for(model))
    assert type(stack) is (FusedStack if family in FUSED else ModuleStack)


# ------------------------------------------------------------------------------------------------ changes


def outputs_agree(model, decoder, new=10):
    ids = torch.tensor([chains()[0]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, custom_generate=decoder, **options)
    return torch.equal(found, model.generate(ids, **options)), found


CHANGES = {
    "in place under no_grad": lambda m: m.model.layers[1].self_attn.q_proj.weight.mul_(-2),
    "in place through .data": lambda m: m.model.layers[1].self_attn.q_proj.weight.data.mul_(-2),
    "+= on .data, as adapters are merged": lambda m: add_to_data(m.model.layers[1].mlp.up_proj.weight),
    "a new parameter": lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.flip(0).clone())),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    "a norm": lambda m: m.model.norm.weight.mul_(torch.linspace(-1, 2, 32)),
    "another activation": lambda m: [setattr(layer.mlp, "act_fn", nn.ReLU()) for layer in m.model.layers],
    "layers in another order": lambda m: setattr(
        m.model, "layers", nn.ModuleList([m.model.layers[i] for i in (2, 1, 0)])
    ),
    "a replaced module": lambda m: setattr(m.model.layers[1].mlp, "down_proj", nn.Linear(48, 32, bias=True)),
}


def add_to_data(weight):
    weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.5


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_between_calls_is_seen_to_have_changed(change):
    model, decoder = llama(), make("prompt_lookup")
    same, before = outputs_agree(model, decoder)
    assert same and isinstance(stack_of(model), FusedStack)
    with torch.no_grad():
        CHANGES[change](model)
    if change == "layers in another order":
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = index
    same, after = outputs_agree(model, decoder)
    assert same, "the decoder still runs the model as it was"
    assert not torch.equal(before, after), "the change must matter"


def test_an_optimizer_step_is_seen():
    model, decoder = llama(), make("prompt_lookup")
    _, before = outputs_agree(model, decoder)
    version = weights_version(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
    model(torch.tensor([chains()[0]]), labels=torch.tensor([chains()[0]])).loss.backward()
    optimizer.step()
    assert weights_version(model) != version
    same, after = outputs_agree(model, decoder)
    assert same and not torch.equal(before, after)


def test_an_unchanged_model_keeps_its_stack():
    model = llama()
    assert stack_of(model) is stack_of(model)
    assert weights_version(model) == weights_version(model)


HOOKED = [
    "model.embed_tokens",
    "model.rotary_emb",
    "model.layers.1",
    "model.layers.1.self_attn",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.act_fn",
    "model.norm",
    "lm_head",
    "model",
    "",
]


def shift(module, inputs, output):
    """Change whatever a module gives back, in a way that depends on the channel."""
    if torch.is_tensor(output):
        return output * torch.linspace(-1, 2, output.shape[-1])
    if isinstance(output, tuple):
        return (output[0] * 0.5, *output[1:])
    name = "last_hidden_state" if "last_hidden_state" in output else "logits"
    output[name] = output[name] + 3 * torch.sin(3.0 * torch.arange(output[name].shape[-1]))
    return output


@pytest.mark.parametrize("where", HOOKED)
def test_forward_hooks_act_and_go(where):
    """Output under a hook is that of plain generation under it, or the request is refused; afterwards all is as
    before."""
    model, decoder = llama(), make("prompt_lookup")
    _, before = outputs_agree(model, decoder)
    handle = model.get_submodule(where).register_forward_hook(shift)
    assert not isinstance(stack_of(model), FusedStack)
    try:
        same, hooked = outputs_agree(model, decoder)
    except ValueError as refusal:
        assert "hook" in str(refusal)
    else:
        assert same and not torch.equal(hooked, before)
    handle.remove()
    same, after = outputs_agree(model, decoder)
    assert same and torch.equal(after, before)
    assert isinstance(stack_of(model), FusedStack)


def test_pre_hooks_and_wrapped_forwards_act():
    model, decoder = llama(), make("prompt_lookup")
    _, before = outputs_agree(model, decoder)
    handle = model.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] * 0.3, *args[1:]))
    same, hooked = outputs_agree(model, decoder)
    assert same and not torch.equal(hooked, before)
    handle.remove()
    mlp = model.model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda hidden: -inner(hidden)
    same, wrapped = outputs_agree(model, decoder)
    assert same and not torch.equal(wrapped, before)


class Switched(nn.Linear):
    """A linear layer with a switch, as adapter libraries put in place of some layers' own."""

    on = False

    def forward(self, hidden):
        out = super().forward(hidden)
        return -out if self.on else out


def test_a_linear_layer_of_another_class_is_never_fused_wherever_it_is():
    model, decoder = llama(), make("prompt_lookup")
    old = model.model.layers[1].mlp.gate_proj
    switched = Switched(old.in_features, old.out_features, bias=False)
    switched.weight = old.weight
    model.model.layers[1].mlp.gate_proj = switched
    same, before = outputs_agree(model, decoder)
    assert same
    switched.on = True
    same, after = outputs_agree(model, decoder)
    assert same, "the switch was not seen"
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=lambda changes: "-".join(f"{k}={v['rope_type'] if isinstance(v, dict) else v}" for k, v in changes.items()),
)
def test_variants_of_one_family_give_the_model_s_own_logits(changes):
    model = llama(**changes)
    logits = read_tree(best_stack(adapter_for(model)), chains(), some_trees())
    assert compare(model, chains(), some_trees(), logits) < 2e-5
    assert outputs_agree(model, make("prompt_lookup"), 30)[0]


def test_a_model_made_in_inference_mode_can_be_used():
    with torch.inference_mode():
        model = llama()
    assert outputs_agree(model, make("prompt_lookup"))[0]


def test_a_model_that_nobody_holds_is_freed():
    model = llama()
    outputs_agree(model, make("dyspec", draft=llama(num_hidden_layers=1)))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None, "something still holds the model after its last call"
