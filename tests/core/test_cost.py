import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pertoken.core import cost


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 8, 16), (5, 7, 3), (0, 4, 4)])
def test_operations_of_a_linear_layer(rows, inputs, outputs, bias):
    layer, x = nn.Linear(inputs, outputs, bias), torch.randn(rows, inputs)
    assert cost.count_flops(lambda: layer(x)) == 2 * rows * inputs * outputs


def test_operations_of_a_batched_product():
    one, other = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6)
    assert cost.count_flops(lambda: one @ other) == 2 * 2 * 3 * 4 * 5 * 6


@pytest.mark.parametrize("mask", ["none", "causal", "additive"])
@pytest.mark.parametrize("inference", [True, False])
def test_operations_of_attention_are_counted(mask, inference):
    batch, heads, queries, keys, width = 2, 4, 6, 6, 8
    q, k, v = (torch.randn(batch, heads, n, width) for n in (queries, keys, keys))
    given = {"none": {}, "causal": {"is_causal": True}, "additive": {"attn_mask": torch.zeros(batch, 1, queries, keys)}}

    def work():
        with torch.inference_mode(inference):
            F.scaled_dot_product_attention(q, k, v, **given[mask])

    assert cost.count_flops(work) == 2 * 2 * batch * heads * queries * keys * width


def test_half_the_tokens_cost_half():
    layer, x = nn.Linear(6, 6), torch.randn(10, 6)
    assert cost.count_flops(lambda: layer(x[:5])) * 2 == cost.count_flops(lambda: layer(x))


def test_weight_bytes_count_shared_weights_once():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False, dtype=torch.bfloat16))
    assert cost.weight_bytes(model) == 4 * 3 * 4 + 4 * 3 * 2
    model[1].weight = model[0].weight
    assert cost.weight_bytes(model) == 4 * 3 * 4


def test_timed_reads_the_clock_even_after_an_error():
    with pytest.raises(ZeroDivisionError), cost.timed() as spent:
        _ = 1 / 0
    assert spent.seconds > 0
    assert spent.peak_bytes > 0
