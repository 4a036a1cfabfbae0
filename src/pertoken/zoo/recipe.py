"""One frozen recipe per zoo model: everything that `pertoken zoo train NAME` needs to train it again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from transformers import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """A Llama architecture; `ffn` is the width of the gated feed-forward block."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = 4096
    positions: int = 512
    rope_theta: float = 10_000.0

    def config(self, end_of_text: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    `exit_scale` weighs the early-exit losses against the final one and `layer_dropout` is the drop rate of the last
    layer, growing exponentially from 0 at the first (LayerSkip, arXiv 2404.16710); `teacher` names the zoo model whose
    distribution the model is distilled from, mixed with the plain loss by `distil`. The last `unlikelihood_steps` steps
    add `unlikelihood_scale` times sequence-level unlikelihood, at rates that fall from `unlikelihood_lr` times the
    peak; the weights exported are those before that stage plus `extrapolate` times the way from there to the mean of
    the weights saved in its second half. `start` names the zoo model whose weights the run begins with (its first
    layers, where this one has fewer). `tokenizer` names the zoo model whose tokenizer a run takes that has neither a
    teacher nor a start; without one the first run of a directory makes its own. `objective` is a name of
    `zoo.train.OBJECTIVES`. Of the rows of `zoo.rows` the share `answers` are prompts with answers, and of these the
    share `tests` functions with unit tests. `lengths`: rows of `zoo.recalling` are of the first of these (length, share
    of the steps) whose share is not yet over, and then of `length`. `layers`: see `zoo.layers`; `keys`: the budget of
    those that choose keys.
    """

    shape: Shape
    steps: int
    batch: int = 8
    length: int = 512
    lr: float = 5e-3
    embedding_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: int = 60
    decay_fraction: float = 0.4
    exit_scale: float = 0.0
    layer_dropout: float = 0.0
    teacher: str | None = None
    start: str | None = None
    tokenizer: str | None = None
    objective: str = "next_token"
    answers: float = 0.4
    tests: float = 0.3
    few: float = 0.0
    stop: float = 1.0
    stop_at: str = "cls"
    lengths: tuple[tuple[int, float], ...] = ()
    layers: str = "dense"
    keys: int = 0
    distil: float = 0.0
    unlikelihood_steps: int = 0
    unlikelihood_scale: float = 8.0
    unlikelihood_lr: float = 0.1
    extrapolate: float = 1.0
    seed: int = 20261124
    evaluate_every: int = 100
    save_every: int = 100


SMALL = Shape(layers=5, width=256, heads=4, kv_heads=2, ffn=704, vocab=4097)


def _base(objective: str) -> Recipe:
    """First stage of the models of equal size, start and data that differ in what they learn to predict: long rows."""
    return Recipe(
        SMALL,
        start="code-target",
        objective=objective,
        steps=1200,
        batch=10,
        length=384,
        lr=4e-3,
        embedding_lr=2e-3,
    )


def _answering(objective: str, start: str, batch: int = 20, length: int = 192) -> Recipe:
    """Their second stage: short rows, most of them prompts with answers."""
    return Recipe(
        SMALL,
        start=start,
        objective=objective,
        answers=0.7,
        tests=0.6,
        steps=1200,
        batch=batch,
        length=length,
        lr=4e-3,
        embedding_lr=2e-3,
    )


INSERTION = replace(_answering("insertion", "code-target", batch=26, length=188), answers=0.4, tests=0.3)
"""What inserts. Rows of even levels hardly ever lack nothing, and a model of these never stops: in a second stage
half of the rows lack few tokens or none."""
RECALL = Recipe(
    Shape(layers=4, width=128, heads=4, kv_heads=2, ffn=256, positions=32_768, rope_theta=1e10),
    objective="recall",
    tokenizer="code-target",
    steps=2000,
    batch=1,
    length=2048,
    lengths=((32, 0.2), (64, 0.3), (128, 0.45), (256, 0.6), (512, 0.75), (1024, 0.9)),
    lr=5e-3,
    embedding_lr=1e-3,
    evaluate_every=200,
)
"""First stage of the models that recall: rows that grow from 32 tokens."""
RECALL_LONG = replace(
    RECALL,
    start="recall-base",
    steps=3000,
    lengths=((256, 0.15), (512, 0.3), (1024, 0.6)),
    lr=4e-3,
    seed=RECALL.seed + 1,
)
"""Their second stage."""
RECALL_FEW = replace(
    RECALL_LONG, start="recall", steps=600, lengths=((256, 0.2), (512, 0.4), (1024, 0.7)), keys=256, lr=2e-3
)
"""What goes on from there with few keys, by models that differ in their layers: first on rows that these hold, in which
the score of every key gets a gradient."""
ASSOCIATING = replace(RECALL_FEW, batch=4, length=512, steps=400, lengths=((64, 0.2), (128, 0.4), (256, 0.7)), keys=0)
"""The same in rows of 512 tokens and fewer."""
READING = Recipe(
    Shape(layers=4, width=128, heads=4, kv_heads=2, ffn=256),
    objective="causal",
    tokenizer="code-target",
    steps=700,
    batch=6,
    evaluate_every=200,
)
"""Code, by models that differ in their layers."""


@dataclass(frozen=True)
class FilterRecipe:
    """How the filters of Learn2PD are trained for a zoo model: records of its own decodes of `batches` batches of
    functions and as many of unit tests, all from the training split, on canvases of `length`; full-batch AdamW. Every
    fifth batch is kept from training and sets tau for each of `rates`, shares of wrong commits. The filters have the
    paper's two layers and, as a control, one."""

    model: str = "code-diffusion"
    block: int = 32
    length: int = 128
    batch: int = 16
    batches: int = 5
    longest_prompt: int = 64
    layers: tuple[int, ...] = (2, 1)
    steps: int = 10_000
    lr: float = 3e-3
    rates: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.05)
    seed: int = 20261124


@dataclass(frozen=True)
class Zoo:
    recipes: dict[str, Recipe] = field(
        default_factory=lambda: {
            "code-target": Recipe(
                Shape(layers=12, width=256, heads=4, kv_heads=2, ffn=704),
                steps=3500,
                unlikelihood_steps=900,
                extrapolate=1.2,
                exit_scale=1.5,
                layer_dropout=0.1,
            ),
            "code-draft": Recipe(
                Shape(layers=2, width=160, heads=5, kv_heads=5, ffn=432),
                steps=2500,
                teacher="code-target",
                distil=0.9,
            ),
            "code-diffusion-base": _base("masked"),
            "code-diffusion": _answering("masked", "code-diffusion-base"),
            "code-twin-base": _base("answering"),
            "code-twin": _answering("answering", "code-twin-base"),
            "code-insertion-base": INSERTION,
            "code-insertion": replace(
                INSERTION,
                start="code-insertion-base",
                tokenizer="code-target",
                few=0.7,
                stop=8.0,
                stop_at="slots",
                steps=700,
                lr=2e-3,
                embedding_lr=1e-3,
            ),
            "recall-base": RECALL,
            "recall": RECALL_LONG,
            "recall-dma": replace(RECALL_FEW, layers="dynamic_mask"),
            "recall-window": replace(RECALL_FEW, layers="window"),
            "associating": ASSOCIATING,
            "associating-dma": replace(ASSOCIATING, layers="dynamic_mask", keys=64),
            "associating-window": replace(ASSOCIATING, layers="window", keys=64),
            "reasoning": Recipe(
                Shape(layers=4, width=96, heads=4, kv_heads=2, ffn=288, vocab=257),
                objective="reasoning",
                steps=900,
                batch=32,
                length=128,
            ),
            "reading": READING,
            "reading-dma": replace(READING, layers="dynamic_mask", keys=128),
            "reading-window": replace(READING, layers="window", keys=128),
        }
    )


RECIPES = Zoo().recipes
FILTERS = {"code-filter": FilterRecipe()}
