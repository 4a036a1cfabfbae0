"""A grid of transformer stages through which every token of an image may take its own way.

Rows are scales: row i holds the tokens of one feature map, whose stride doubles from row to row. Columns are steps. At
node (i, j) a token may go right through a transformer stage B, right past it, and down through a patch embedding P:

    F[i, j] = g * B[i, j-1](F[i, j-1]) + (1 - g) * F[i, j-1] + P[i-1, j](d * norm(F[i-1, j]))

with g of the token at (i, j-1) and d of those at (i-1, j), 0 or 1; terms that do not exist drop out. F[0, 0] is the
stem's patch embedding. A row opens at the column of its number, and stages end at the last column, whose rows are what
heads read. Stages and patch embeddings are transformers' own PVTv2 modules, so that stage i and embedding i + 1 of a
PVTv2 are one way through the grid, the diagonal. Every node has two linear gates, which only a router asks.

A token that takes no stage costs nothing of it but its share of what all queries read: keys and values come from all
tokens of the map, by PVTv2's spatial reduction, and the depth-wise convolution of the feed-forward block runs over the
map, in which tokens that do not take the stage are 0. An image in which no token takes an edge does not run it. A place
of the next row gets something if a token in the receptive field of its patch embedding goes down; until it does there
is no token at it: it is neither query nor key, has no gates and no share in what heads read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PvtV2Config
from transformers.modeling_outputs import ModelOutput
from transformers.models.pvt_v2.modeling_pvt_v2 import PvtV2OverlapPatchEmbeddings, PvtV2PreTrainedModel

from pertoken.core.errors import BadRequest
from pertoken.models.edges import Down, Gate, Map, Stage, Ways, as_map

POOLED = ("rows", "deepest")


class GridConfig(PretrainedConfig):
    """base_config: of the PVTv2 whose stages and patch embeddings the nodes have; columns: stages that a token of the
    first row can take; pooled: what a classifier reads, the mean over all "rows" of their tokens' means, each projected
    to the width of the last, or the "deepest" row alone, as PVTv2 does; ema: share of the old in the moving average of
    the gates' weights, None for none."""

    model_type = "pertoken_grid"
    sub_configs: ClassVar[Any] = {"base_config": AutoConfig}  # type: ignore[assignment]

    def __init__(
        self,
        base_config: Any = None,
        columns: int = 4,
        pooled: str = "rows",
        ema: float | None = 0.9,
        **kwargs: Any,
    ):
        if isinstance(base_config, dict):
            given = dict(base_config)
            base_config = AutoConfig.for_model(given.pop("model_type"), **given)
        self.base_config = PvtV2Config() if base_config is None else base_config
        self.columns, self.pooled, self.ema = columns, pooled, ema
        self.initializer_range = self.base_config.initializer_range
        rows = len(self.base_config.hidden_sizes)
        if columns < rows:
            raise BadRequest(f"columns={columns} do not reach row {rows - 1}; give {rows} or more, one for each row")
        if pooled not in POOLED:
            raise BadRequest(f"pooled={pooled!r} is unknown; choose {' or '.join(map(repr, POOLED))}")
        if ema is not None and not 0 <= ema < 1:
            raise BadRequest(f"ema={ema} is outside [0, 1); give the share of the old, or None for no average")
        super().__init__(**kwargs)

    @property
    def rows(self) -> int:
        return len(self.base_config.hidden_sizes)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it is made for; it takes others too."""
        size: Any = self.base_config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def nodes(self) -> Iterator[tuple[int, int]]:
        """Row and column of every node with an edge, in the order in which they are computed."""
        return ((i, j) for j in range(self.columns) for i in range(min(j + 1, self.rows)))

    def goes_down(self, row: int, column: int) -> bool:
        """Whether the node has a patch embedding to the next row, which is open from the column of its number on."""
        return row + 1 < self.rows and column >= row + 1

    def edges(self) -> tuple[tuple[int, int, str], ...]:
        """Row, column and kind, "transform" or "down", of all edges, in the order in which they are computed."""
        found = []
        for i, j in self.nodes():
            found += ([(i, j, "down")] if self.goes_down(i, j) else []) + [(i, j, "transform")]
        return tuple(found)

    def diagonal(self) -> tuple[tuple[int, int, str], ...]:
        """The edges of the PVTv2 that the grid is made of, in order."""
        edges = []
        for i in range(self.rows):
            edges += [(i, i, "transform")] + ([(i, i + 1, "down")] if i + 1 < self.rows else [])
        return tuple(edges)


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of one image, by row. token: of a stage, for each token that takes it; once: of a stage that any
    token takes; output: of a patch embedding, for each token that it makes; tokens: of each row's map."""

    token: tuple[float, ...]
    once: tuple[float, ...]
    output: tuple[float, ...]
    tokens: tuple[int, ...]

    def edge(self, row: int, kind: str) -> float:
        """Of an edge that all tokens take."""
        if kind == "down":
            return self.tokens[row + 1] * self.output[row]
        return self.tokens[row] * self.token[row] + self.once[row]

    def of(self, edges: Iterable[tuple[int, int, str]]) -> float:
        """Of edges that all tokens take: row, column, kind."""
        return sum(self.edge(row, kind) for row, _, kind in edges)


def map_sizes(base: PvtV2Config, height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of each row's map, for an image of this size; raises `BadRequest` for one that is too small."""
    sizes, now = [], (height, width)
    for patch, stride, ratio in zip(base.patch_sizes, base.strides, base.sr_ratios, strict=True):
        now = tuple((length + 2 * (patch // 2) - patch) // stride + 1 for length in now)
        least = 1 if base.linear_attention else ratio
        if min(now) < least:
            raise BadRequest(
                f"images of {width} x {height} pixels are too small: row {len(sizes)} of the grid has a map of "
                f"{now[1]} x {now[0]} tokens, of which attention reads one in {least} x {least}; give larger images"
            )
        sizes.append(now)
    return sizes


def costs(base: PvtV2Config, height: int, width: int) -> Costs:
    """What edges cost for an image of this size. The stem, the gates and the heads are not counted."""
    token, once, output, tokens = [], [], [], []
    for i, (high, wide) in enumerate(map_sizes(base, height, width)):
        own, depth, ratio = base.hidden_sizes[i], base.depths[i], base.sr_ratios[i]
        hidden, count = int(own * base.mlp_ratios[i]), high * wide
        if base.linear_attention:
            keys, reduce = 49, 49 * own * own
        else:
            keys = (high // ratio) * (wide // ratio)
            reduce = keys * ratio * ratio * own * own if ratio > 1 else 0
        token.append(depth * (2 * own * own + 2 * keys * own + 2 * own * hidden))
        once.append(depth * (reduce + 2 * keys * own * own + 9 * count * hidden))
        tokens.append(count)
        if i + 1 < len(base.hidden_sizes):
            output.append(base.patch_sizes[i + 1] ** 2 * own * base.hidden_sizes[i + 1])
    return Costs(tuple(token), tuple(once), tuple(output), tuple(tokens))


@dataclass
class GridOutput(ModelOutput):
    """loss: cross-entropy, if labels were given; logits `[image, class]`; spent `[image]`: operations of all edges
    taken, as a share of those of the PVTv2 on the diagonal, with the gates' gradient where a router learns."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    spent: Tensor | None = None


class GridClassifier(PvtV2PreTrainedModel):
    """See the module. Without a router every token takes every edge. choose: set by what is attached to the model;
    called with row, column and `Map` of each node in order."""

    config: GridConfig
    config_class = GridConfig
    base_model_prefix = ""
    choose: Callable[[int, int, Map], Ways] | None = None

    def __init__(self, config: GridConfig):
        super().__init__(config)
        base, widths = config.base_config, config.base_config.hidden_sizes
        self.stem = PvtV2OverlapPatchEmbeddings(base, 0)
        self.stages, self.downs, self.gates = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for i, j in config.nodes():
            self.stages[f"{i}_{j}"] = Stage(base, i)
            gates = {"transform": Gate(widths[i], config.ema)}
            if config.goes_down(i, j):
                self.downs[f"{i}_{j}"] = Down(base, i)
                gates["down"] = Gate(widths[i], config.ema)
            self.gates[f"{i}_{j}"] = nn.ModuleDict(gates)
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=base.layer_norm_eps) for width in widths])
        self.projections = nn.ModuleList(
            [nn.Linear(width, widths[-1]) for width in widths] if config.pooled == "rows" else []
        )
        labels: Any = config.num_labels
        self.classifier = nn.Linear(widths[-1], labels)
        self.post_init()

    @property
    def whole(self) -> float:
        """What the whole grid costs as a share of its diagonal, for images of the configured size."""
        table = costs(self.config.base_config, *self.config.image_size)
        return table.of(self.config.edges()) / table.of(self.config.diagonal())

    def walk(self, pixel_values: Tensor) -> tuple[list[Map], Tensor]:
        """The rows at the last column, and what was `spent`."""
        config, table = self.config, costs(self.config.base_config, *pixel_values.shape[-2:])
        sizes = map_sizes(config.base_config, *pixel_values.shape[-2:])
        hidden, high, wide = self.stem(pixel_values)
        images, spent = len(hidden), hidden.new_zeros(len(hidden), dtype=torch.float32)
        here = [Map(hidden, hidden.new_ones(hidden.shape[:2], dtype=torch.bool), (high, wide), True)]
        for j in range(config.columns):
            arriving: Map | None = None
            for i in range(min(j + 1, config.rows)):
                if i == len(here):
                    empty = hidden.new_zeros(images, sizes[i][0] * sizes[i][1], config.base_config.hidden_sizes[i])
                    here.append(Map(empty, empty.new_zeros(empty.shape[:2], dtype=torch.bool), sizes[i], False))
                if arriving is not None:
                    here[i], arriving = here[i].plus(arriving), None
                ways = None if self.choose is None else self.choose(i, j, here[i])
                if config.goes_down(i, j):
                    arriving, outputs = self.downs[f"{i}_{j}"](here[i], None if ways is None else ways.down)
                    spent = spent + outputs * table.output[i]
                taken = None if ways is None else ways.transform
                here[i] = self.stages[f"{i}_{j}"](here[i], taken)
                if taken is None:
                    spent = spent + table.edge(i, "transform")
                else:
                    spent = spent + taken.sum(-1) * table.token[i] + taken.float().amax(-1) * table.once[i]
        return here, spent / table.of(config.diagonal())

    def feature_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """`[image, width, height, width]` of every row at the last column, normed: what a feature pyramid reads."""
        rows, _ = self.walk(pixel_values)
        return [
            as_map(norm(row.hidden) * row.live[..., None], row.size) for norm, row in zip(self.norms, rows, strict=True)
        ]

    def pool(self, rows: list[Map]) -> Tensor:
        """`[image, width]`: what the classifier reads."""
        means, there = [], []
        for norm, row in zip(self.norms, rows, strict=True):
            live = row.live[..., None].to(row.hidden.dtype)
            means.append((norm(row.hidden) * live).sum(1) / live.sum(1).clamp(min=1))
            there.append(row.live.any(-1))
        if self.config.pooled == "deepest":
            return means[-1]
        weight = torch.stack(there).to(means[0].dtype)[..., None]
        projected = torch.stack([project(mean) for project, mean in zip(self.projections, means, strict=True)])
        return (projected * weight).sum(0) / weight.sum(0)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> GridOutput:
        """pixel_values `[image, channel, height, width]`; labels `[image]` int64."""
        rows, spent = self.walk(pixel_values)
        logits = self.classifier(self.pool(rows))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return GridOutput(loss=loss, logits=logits, spent=spent)


def grid_of(model: Any, columns: int | None = None, pooled: str = "rows") -> GridClassifier:
    """A grid that begins with what a PVTv2 classifier of transformers has learnt: every stage and patch embedding of a
    row is the model's own. columns: one more than it has stages if not given. Pooled from the "deepest" row, the
    diagonal is the model; the projections of "rows" are new."""
    if getattr(getattr(model, "config", None), "model_type", None) != "pvt_v2" or not hasattr(model, "classifier"):
        raise BadRequest(f"a grid is made of a PvtV2ForImageClassification, got {type(model).__name__}; give one")
    base = model.config
    rows = len(base.hidden_sizes)
    config = GridConfig(base, rows + 1 if columns is None else columns, pooled, num_labels=base.num_labels)
    grid = GridClassifier(config).to(next(model.parameters()).dtype)
    layers = model.pvt_v2.encoder.layers
    pairs: list[tuple[Any, Any]] = [(grid.stem, layers[0].patch_embedding)]
    for name, stage in grid.stages.items():
        pairs.append((stage.blocks, layers[int(name.split("_")[0])].blocks))  # type: ignore[arg-type]
    for name, down in grid.downs.items():
        row = int(name.split("_")[0])
        pairs += [(down.norm, layers[row].layer_norm), (down.embed, layers[row + 1].patch_embedding)]
    pairs += [(norm, layer.layer_norm) for norm, layer in zip(grid.norms, layers, strict=True)]
    pairs.append((grid.classifier, model.classifier))
    for own, given in pairs:
        own.load_state_dict(given.state_dict())
    return grid.train(model.training)
