"""Claims of LangDC: tokens that follow what there is to tell, answers against fixed ratios, lots and the whole clip,
the layer whose states are used, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pertoken.bench import pictures
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.cost import count_flops
from pertoken.core.estimates import spearman
from pertoken.models.llava import VIDEO, Llava
from pertoken.reduce.clips import Clips
from pertoken.reduce.expert import Expert
from pertoken.reduce.fixed_pooling import FixedPooling
from pertoken.reduce.langdc import LangDC
from pertoken.reduce.language import REPORT
from pertoken.reduce.random_places import RandomPlaces
from pertoken.zoo import model_path, watching
from pertoken.zoo.scene_recipe import HELD
from pertoken.zoo.scenes import Clip, as_input, clip, kind_of_question

HOST = "clips-langdc"
BIASES = (0.0, 6.0, 9.0, 12.0)
ROOM = Budget(fraction=0.75)  # so that no description is cut


def host(bench: Bench) -> Any:
    def make() -> Any:
        from transformers import LlavaNextVideoForConditionalGeneration

        return LlavaNextVideoForConditionalGeneration.from_pretrained(model_path(HOST), dtype=torch.float32).eval()

    return bench.shared("host", make)


def parts() -> Path:
    """Where LangDC's parts for the host are."""
    return model_path(HOST) / watching.PARTS


def expert(bench: Bench, layer: int | None = None) -> Expert:
    """The zoo's expert, or with the states of another layer."""
    used: Expert = bench.shared("expert", lambda: Expert.load(parts()))
    if layer is None:
        return used
    return bench.shared(("expert", layer), lambda: watching.at_layer(used, parts(), layer))


def held(bench: Bench) -> tuple[list[Clip], Tensor, list[tuple[str, str]]]:
    """512 clips that nothing was trained on, or 64 when quick, with a question each."""
    return bench.shared("held clips", lambda: watching.asked(64 if bench.quick else 512))


def langdc(bench: Bench, layer: int | None = None, bias: float = 0.0) -> LangDC:
    return bench.shared(("langdc", layer, bias), lambda: LangDC(ROOM, expert=expert(bench, layer), end_bias=bias))


def watched(bench: Bench, policy: Clips | None = None) -> dict[str, Any]:
    """right: for each held-out clip whether the answer was; tokens of each; by kind of question, the share."""

    def work() -> dict[str, Any]:
        model, (_, pixels, pairs) = host(bench), held(bench)
        right: list[bool] = []
        tokens: list[int] = []
        for start in range(0, len(pairs), 32):
            part = slice(start, start + 32)
            if policy is None:
                right += watching.right(model, pixels[part], pairs[part])
                tokens += [model.config.video_seq_length] * len(pairs[part])
                continue
            with attach(model, policy) as attached:
                right += watching.right(model, pixels[part], pairs[part])
                tokens += attached.state[REPORT]["kept"]
        kinds: dict[str, list[bool]] = {}
        for one, (question, _) in zip(right, pairs, strict=True):
            kinds.setdefault(kind_of_question(question), []).append(one)
        return {
            "right": sum(right) / len(right),
            "tokens": tokens,
            "mean tokens": sum(tokens) / len(tokens),
            "by kind": {kind: sum(own) / len(own) for kind, own in sorted(kinds.items())},
        }

    return bench.shared(("watched", policy), work)


def told(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "tokens"}


def at_least(bench: Bench, tokens: float) -> Budget:
    """The smallest budget with a grid that the host was trained with and no fewer tokens than `tokens`."""
    cells = sorted(rows * columns for rows, columns in watching.GRIDS)
    enough = [cell * watching.FRAMES for cell in cells if cell * watching.FRAMES >= tokens]
    return Budget(tokens=enough[0] if enough else cells[-1] * watching.FRAMES)


@claim(
    "langdc",
    claim="Clips with more to tell get more tokens",
    metric="rank correlation of things and movements with tokens",
    expected="> 0.8",
    compare="value",
    shown=True,
)
def follows_the_clip(bench: Bench) -> Measurement:
    made, tokens = held(bench)[0], watched(bench, langdc(bench))["tokens"]
    events = [float(sum(one.events(segment) for segment in range(len(one.ways)))) for one in made]
    things = [float(len(one.things)) for one in made]
    by_things = {
        str(number): sum(t for t, n in zip(tokens, things, strict=True) if n == number) / max(things.count(number), 1)
        for number in sorted(set(things))
    }
    detail = {
        "mean tokens by things": by_things,
        "with things alone": spearman(things, list(map(float, tokens))),
    }
    return Measurement(spearman(events, list(map(float, tokens))), "no relation", 0.0, len(made), detail)


@claim(
    "langdc",
    claim="Clips that show nothing get the fewest tokens",
    metric="mean soft tokens of a clip without things, of all with things as baseline",
    expected="<= 0.5",
)
def blank_clips(bench: Bench) -> Measurement:
    model, policy, tokens = host(bench), langdc(bench), watched(bench, langdc(bench))["tokens"]
    blank = [clip(HELD + i, watching.FRAMES, count=0) for i in range(32)]
    pixels = as_input([frame for one in blank for frame in one.frames]).unflatten(0, (32, watching.FRAMES))
    with attach(model, policy) as attached:
        watching.right(model, pixels, [("how many things ?", "0")] * 32)
        kept = attached.state[REPORT]["kept"]
    coarse = watching.FRAMES * expert(bench).setting.base ** 2
    value, all_ = (sum(counts) / len(counts) - coarse for counts in (kept, tokens))
    return Measurement(value, "clips with things", all_, 32, {"fewest of clips with things": min(tokens) - coarse})


@claim(
    "langdc",
    claim="It answers more than pooling at a fixed ratio with as many tokens or more",
    metric="share of right answers",
    expected="> 1",
    shown=True,
)
def above_fixed(bench: Bench) -> Measurement:
    ours = watched(bench, langdc(bench))
    every = {
        f"{r} x {c}": told(watched(bench, FixedPooling(Budget(tokens=r * c * watching.FRAMES))))
        for r, c in watching.GRIDS
    }
    fixed = watched(bench, FixedPooling(at_least(bench, ours["mean tokens"])))
    return Measurement(
        ours["right"], "fixed_pooling", fixed["right"], len(ours["tokens"]), {"langdc": told(ours), "fixed": every}
    )


@claim(
    "langdc",
    claim="The description is worth more than its coarse tokens alone",
    metric="share of right answers",
    expected="> 1",
)
def above_coarse(bench: Bench) -> Measurement:
    ours, coarse = watched(bench, langdc(bench)), watching.FRAMES * expert(bench).setting.base ** 2
    alone = watched(bench, FixedPooling(Budget(tokens=coarse)))
    return Measurement(ours["right"], "coarse tokens", alone["right"], len(ours["tokens"]), {"tokens": coarse})


@claim(
    "langdc",
    claim="It answers more than with as many of the host's own tokens, left by lot",
    metric="share of right answers",
    expected="> 1",
)
def above_random(bench: Bench) -> Measurement:
    ours = watched(bench, langdc(bench))
    lot = watched(bench, RandomPlaces(Budget(tokens=round(ours["mean tokens"]))))
    return Measurement(ours["right"], "random_places", lot["right"], len(ours["tokens"]), told(lot))


@claim(
    "langdc",
    claim="With under half of the tokens it answers about as much as the host with all of them",
    metric="share of right answers",
    expected=">= 0.97",
    shown=True,
)
def like_full(bench: Bench) -> Measurement:
    ours, full = watched(bench, langdc(bench)), watched(bench)
    detail = {"share of the tokens": ours["mean tokens"] / full["mean tokens"], "full": told(full)}
    return Measurement(ours["right"], "full", full["right"], len(ours["tokens"]), detail)


@claim(
    "langdc",
    claim="States of a middle layer answer at least as much as those of the last",
    metric="share of right answers",
    expected=">= 1",
)
def middle_against_last(bench: Bench) -> Measurement:
    return against_layer(bench, expert(bench).language.config.num_hidden_layers)


@claim(
    "langdc",
    claim="States of a middle layer answer more than embeddings of the description",
    metric="share of right answers",
    expected="> 1",
)
def middle_against_first(bench: Bench) -> Measurement:
    return against_layer(bench, 0)


def against_layer(bench: Bench, layer: int) -> Measurement:
    ours, other = watched(bench, langdc(bench)), watched(bench, langdc(bench, layer))
    detail = {"layer": expert(bench).setting.layer, "other layer": layer, "by kind": other["by kind"]}
    return Measurement(ours["right"], f"layer {layer}", other["right"], len(ours["tokens"]), detail)


@claim(
    "langdc",
    claim="A description that is read in one forward gives the states that its decoding gave",
    metric="largest difference relative to the largest state",
    expected="<= 1e-5",
    compare="value",
)
def decoded_like_read(bench: Bench) -> Measurement:
    used = expert(bench)
    with torch.inference_mode():
        segments = used.segments(Llava(host(bench), VIDEO).frames(held(bench)[1][:32]))
        said = used.describe(segments, 32)
        read = used.carried(used.read(segments, said.ids), said.ids.shape[1])
        alone = used.describe(segments[:1], 32)
    gap = float((said.hidden - read).abs().max() / read.abs().max())
    count = alone.hidden.shape[1]
    batch = float((said.hidden[:1, :count] - alone.hidden).abs().max() / read.abs().max())
    return Measurement(max(gap, batch), "exact", 0.0, len(segments), {"read": gap, "alone": batch})


@claim(
    "langdc",
    claim="A bias on the end token shortens descriptions by a third or more, and costs answers at most in proportion",
    metric="share of right answers per share of the soft tokens, of the shortest of a few biases",
    expected=">= 1",
)
def bias_is_a_dial(bench: Bench) -> Measurement:
    coarse = watching.FRAMES * expert(bench).setting.base ** 2
    rows = {bias: watched(bench, langdc(bench, bias=bias)) for bias in BIASES}
    usual = rows[0.0]
    shorter = [
        (bias, one)
        for bias, one in rows.items()
        if one["mean tokens"] - coarse <= (usual["mean tokens"] - coarse) * 2 / 3
    ]
    detail = {"by bias": {str(bias): told(one) for bias, one in rows.items()}}
    if not shorter:
        return Measurement(0.0, "no bias", 1.0, len(usual["tokens"]), detail)
    _, one = shorter[0]
    kept = (one["mean tokens"] - coarse) / (usual["mean tokens"] - coarse)
    return Measurement(one["right"] / usual["right"] / kept, "no bias", 1.0, len(usual["tokens"]), detail)


@claim(
    "langdc",
    claim="The host's language model computes less for a question than with all of its tokens",
    metric="operations of the language model for a batch of 32 questions",
    expected="<= 0.6",
)
def less_to_read(bench: Bench) -> Measurement:
    model, (_, pixels, pairs) = host(bench), held(bench)
    given = watching.prompts([q for q, _ in pairs[:32]], watching.VIDEO, model.config.video_seq_length)
    whole = given | {"pixel_values_videos": pixels[:32]}
    found = {}
    for name, policy in (("full", None), ("langdc", langdc(bench))):
        with torch.inference_mode():
            if policy is None:
                states = count_flops(lambda: model.model.get_video_features(pixels[:32]))
                found[name] = (count_flops(lambda: model(**whole)), states)
                continue
            with attach(model, policy):
                states = count_flops(lambda: model.model.get_video_features(pixels[:32]))
                found[name] = (count_flops(lambda: model(**whole)), states)
    ours, full = (found[name][0] - found[name][1] for name in ("langdc", "full"))
    detail = {"with encoder and expert": {name: one[0] for name, one in found.items()}}
    return Measurement(ours, "full", full, 32, detail)


@claim(
    "langdc",
    claim="A question about a clip is answered in less time than with all of the host's tokens",
    metric="median seconds for the first token of 32 questions, encoder and expert included",
    expected="< 1",
)
def less_time(bench: Bench) -> Measurement:
    model, (_, pixels, pairs) = host(bench), held(bench)
    given = watching.prompts([q for q, _ in pairs[:32]], watching.VIDEO, model.config.video_seq_length)
    whole = given | {"pixel_values_videos": pixels[:32]}

    def with_policy() -> None:
        with attach(model, langdc(bench)):
            model(**whole)

    spent = pictures.seconds({"full": lambda: model(**whole), "langdc": with_policy}, 3 if bench.quick else 15)
    return Measurement(spent["langdc"], "full", spent["full"], 32, {"host": "0.8 M parameters, a half in the encoder"})
