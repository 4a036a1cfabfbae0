"""Small random grids, and the grid's update as a loop over tokens: the equation of `models.grid` and nothing else."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from transformers import PvtV2Config

from pertoken.depth.routing import SITE
from pertoken.models.edges import Gate
from pertoken.models.grid import GridClassifier, GridConfig


def base(**settings):
    given = {
        "image_size": 24,
        "num_encoder_blocks": 3,
        "depths": (1, 2, 1),
        "sr_ratios": (3, 2, 1),
        "hidden_sizes": (8, 12, 16),
        "patch_sizes": (7, 3, 3),
        "strides": (4, 2, 2),
        "num_attention_heads": (1, 2, 2),
        "mlp_ratios": (2, 2, 2),
        "initializer_range": 0.3,
        "num_labels": 5,
    }
    return PvtV2Config(**(given | settings))


def grid(pooled="rows", ema=0.9, columns=4, **settings):
    """A grid whose gates are of both minds about most tokens."""
    torch.manual_seed(4)
    model = GridClassifier(GridConfig(base(**settings), columns, pooled, ema, num_labels=5)).eval()
    generator = torch.Generator().manual_seed(5)
    for gate in model.modules():
        if isinstance(gate, Gate):
            for own, mean in (("weight", "mean_weight"), ("bias", "mean_bias")):
                drawn = torch.randn(getattr(gate, own).shape, generator=generator)
                getattr(gate, own).data.copy_(drawn)
                if ema is not None:
                    getattr(gate, mean).copy_(drawn)
    return model


def images(count=4, size=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator)


def naive(model, pixels, trace):
    """Logits of one image `[1, 3, height, width]`, with the decisions of a recording of it alone."""
    made = {step.site: step.decision for step in trace.steps}
    config = model.config.base_config
    first = model.stem.proj(pixels)
    width = first.shape[-1]
    rows = [{place: model.stem.layer_norm(vector) for place, vector in enumerate(first[0].flatten(1).T)}]
    widths, heights = [width], [first.shape[-2]]
    for j in range(model.config.columns):
        for i in range(min(j + 1, model.config.rows)):
            layers = made[f"{SITE}.{i}.{j}"].layers[0]
            here = rows[i]
            if model.config.goes_down(i, j):
                down = model.downs[f"{i}_{j}"]
                if i + 1 == len(rows):
                    rows.append({})
                    widths.append(math.ceil(widths[i] / 2))
                    heights.append(math.ceil(heights[i] / 2))
                for place in range(heights[i + 1] * widths[i + 1]):
                    y, x = divmod(place, widths[i + 1])
                    total, reached = down.embed.proj.bias.clone(), False
                    for dy in range(3):
                        for dx in range(3):
                            sy, sx = 2 * y + dy - 1, 2 * x + dx - 1
                            source = sy * widths[i] + sx
                            if 0 <= sy < heights[i] and 0 <= sx < widths[i] and source in here and layers[source, 1]:
                                reached = True
                                total = total + down.embed.proj.weight[:, :, dy, dx] @ down.norm(here[source])
                    if reached:
                        value = down.embed.layer_norm(total)
                        rows[i + 1][place] = rows[i + 1][place] + value if place in rows[i + 1] else value
            rows[i] = staged(model.stages[f"{i}_{j}"], config, here, layers[:, 0], heights[i], widths[i], i)
    means = []
    for norm, row in zip(model.norms, rows, strict=True):
        means.append(torch.stack([norm(v) for v in row.values()]).mean(0) if row else None)
    if model.config.pooled == "deepest":
        return model.classifier(means[-1])
    read = [project(m) for project, m in zip(model.projections, means, strict=True) if m is not None]
    return model.classifier(torch.stack(read).mean(0))


def staged(stage, config, here, taken, height, width, row):
    """Tokens of a row, by place, after a stage."""
    if not here:
        return here
    for block in stage.blocks:
        attention, mlp = block.attention, block.mlp
        keys = keys_of(attention, config, {p: block.layer_norm_1(v) for p, v in here.items()}, height, width, row)
        k, v = torch.stack([attention.key(x) for x in keys]), torch.stack([attention.value(x) for x in keys])
        after, inner = dict(here), {}
        for place in here:
            if not taken[place]:
                continue
            query, outs = attention.query(block.layer_norm_1(here[place])), []
            for head in range(attention.num_attention_heads):
                part = slice(head * attention.attention_head_size, (head + 1) * attention.attention_head_size)
                law = (k[:, part] @ query[part] / math.sqrt(attention.attention_head_size)).softmax(0)
                outs.append(law @ v[:, part])
            after[place] = here[place] + attention.proj(torch.cat(outs))
            inner[place] = mlp.relu(mlp.dense1(block.layer_norm_2(after[place])))
        kernel, bias = mlp.dwconv.dwconv.weight[:, 0], mlp.dwconv.dwconv.bias
        for place in inner:
            y, x = divmod(place, width)
            total = bias.clone()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width and place + dy * width + dx in inner:
                        total = total + kernel[:, dy + 1, dx + 1] * inner[place + dy * width + dx]
            after[place] = after[place] + mlp.dense2(F.gelu(total))
        here = after
    return here


def keys_of(attention, config, normed, height, width, row):
    """What keys and values are made of, one vector for each window in which there is a token."""
    ratio = config.sr_ratios[row]
    if not normed or (not config.linear_attention and ratio == 1):
        return list(normed.values())
    found = []
    if config.linear_attention:
        bins = [(n * size // 7, -(-(n + 1) * size // 7)) for size in (height, width) for n in range(7)]
        for top, bottom in bins[:7]:
            for left, right in bins[7:]:
                inside = [y * width + x for y in range(top, bottom) for x in range(left, right)]
                there = [normed[place] for place in inside if place in normed]
                if there:
                    mean = attention.spatial_reduction.weight[:, :, 0, 0] @ torch.stack(there).mean(0)
                    found.append(attention.act(attention.layer_norm(mean + attention.spatial_reduction.bias)))
        return found
    for top in range(height // ratio):
        for left in range(width // ratio):
            total, any_there = attention.spatial_reduction.bias.clone(), False
            for dy in range(ratio):
                for dx in range(ratio):
                    place = (top * ratio + dy) * width + left * ratio + dx
                    if place in normed:
                        any_there = True
                        total = total + attention.spatial_reduction.weight[:, :, dy, dx] @ normed[place]
            if any_there:
                found.append(attention.layer_norm(total))
    return found
