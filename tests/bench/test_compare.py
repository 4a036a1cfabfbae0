import json

import pytest
import torch

from pertoken.bench import compare as module
from pertoken.bench import sides
from pertoken.bench.compare import Options, compare
from pertoken.bench.settings import Config
from pertoken.bench.sides import Given, default_beside, default_drafts, default_filter, make_side
from pertoken.bench.texts import Example, agreement, pieces, read_examples, read_prompts
from pertoken.core import card
from pertoken.core.budget import Budget
from pertoken.methods import load_methods
from tests.bench import toys

RUN_KEYS = {
    "name",
    "label",
    "seconds",
    "tokens",
    "tokens_per_second",
    "steps",
    "flops",
    "peak_bytes",
    "speedup",
    "identical",
    "agreement",
}


@pytest.fixture
def decoders(monkeypatch):
    """Toy models in place of loaded ones, and a registry of toy decoders; yields the decoders that were built."""
    built = {}

    def make(name, kind, given):
        built[name] = toys.Greedy(wrong=name == "wrong")
        return built[name]

    monkeypatch.setattr(card, "_REGISTRY", {})
    monkeypatch.setattr(module, "load_methods", lambda: None)
    monkeypatch.setattr(module, "load_model", lambda name, dtype: (toys.model(), toys.tokenizer()))
    monkeypatch.setattr(sides, "make_decoder", make)
    for name, shape, needs in (
        ("full", "decoder", set()),
        ("right", "decoder", {"draft"}),
        ("wrong", "decoder", set()),
        ("weigher", "objective", set()),
    ):
        build = type(name, (), {"__module__": "tests", "__doc__": name})
        given = {"question": "decode", "shape": shape, "exactness": "lossless", "paper": card.Paper(name)}
        card.method(**given, name=name, needs=needs)(build)
    return built


def small(**changed) -> Options:
    return Options(**({"max_new_tokens": 6, "dtype": "fp32", "repeats": 1} | changed))


def test_sides_are_the_plain_loop_the_baseline_and_the_methods(decoders):
    found = compare(["right", "wrong"], "toy", None, ["def f(x):"], small())
    assert [run.name for run in found.runs] == ["generate", "full", "right", "wrong"]
    plain, full, right, wrong = found.runs
    assert (plain.identical, full.identical, right.identical, wrong.identical) == (True, True, True, False)
    assert full.speedup == pytest.approx(1)
    assert right.speedup == pytest.approx(right.tokens_per_second / full.tokens_per_second)
    assert {run.tokens for run in found.runs} == {6}
    assert {run.steps for run in found.runs} == {6}
    assert found.outputs["right"] == found.outputs["generate"] != found.outputs["wrong"]


def test_operations_are_those_of_one_pass(decoders):
    found = compare([], "toy", None, ["def f(x):"], small())
    plain, full = found.runs
    assert 0 < plain.flops < full.flops, "the toy decoder reads everything again at every step"
    assert min(run.peak_bytes for run in found.runs) > 2**20


@pytest.mark.parametrize("batch, calls", [(8, 1), (2, 2), (1, 3)])
def test_ragged_prompts_in_batches_agree_with_the_plain_loop(decoders, batch, calls):
    prompts = ["import os", "x", "class Tree:\n    def"]
    found = compare(["right"], "toy", None, prompts, small(batch=batch, repeats=2))
    assert [run.identical for run in found.runs] == [True] * 3
    assert found.runs[0].tokens == found.runs[-1].tokens
    assert decoders["right"].calls == calls * (1 + 2 + 1), "one warm-up pass, two timed ones, one counted"
    assert len(found.outputs["right"]) == 3
    assert len(found.traces[-1].about["rows"]) == min(batch, 3), "the first batch is drawn"


def test_what_a_trace_is_about(decoders):
    prompts = ["x = 1", "for i in"]
    found = compare(["right"], "toy", None, prompts, small())
    full, right = found.traces
    assert set(right.about) == {"method", "model", "rows", "runs", "vocabulary"}
    assert (full.about["method"], right.about["method"], right.about["model"]) == ("full", "right", "toy")
    for prompt, row, output in zip(prompts, right.about["rows"], found.outputs["right"], strict=True):
        assert "".join(row["prompt"]) == prompt
        assert "".join(row["output"]).replace(toys.END, "") == output
        assert len(row["output"]) <= 6
    assert [set(run) for run in right.about["runs"]] == [RUN_KEYS] * 3
    assert len(right.steps) == 6
    json.dumps(right.about, allow_nan=False)
    json.dumps(found.to_json(), allow_nan=False)


def test_sampling_is_seeded_and_not_called_identical(decoders):
    options = small(temperature=1.0, top_k=5, top_p=0.9, max_new_tokens=12)
    first, again = (compare([], "toy", None, ["while"], options) for _ in range(2))
    other = compare([], "toy", None, ["while"], small(temperature=1.0, max_new_tokens=12, seed=1))
    assert first.outputs["generate"] == again.outputs["generate"] != other.outputs["generate"]
    assert {run.identical for run in first.runs} == {None}


def test_the_models_hooks_are_as_before(decoders, monkeypatch):
    from pertoken.core.fingerprint import changed, fingerprint

    model = toys.model()
    monkeypatch.setattr(module, "load_model", lambda name, dtype: (model, toys.tokenizer()))
    before = fingerprint(model)
    compare(["right"], "toy", None, ["if"], small())
    assert changed(before, fingerprint(model)) == []


def test_generate_can_be_the_baseline(decoders):
    found = compare(["full"], "toy", None, ["if"], small(baseline="generate"))
    assert [run.name for run in found.runs] == ["generate", "full"]
    assert found.runs[0].speedup == pytest.approx(1)


REFUSED = {
    "an unknown method": (["rigth"], ["x"], {}, "did you mean right"),
    "an unknown baseline": (["right"], ["x"], {"baseline": "ful"}, "did you mean full"),
    "an objective": (["weigher"], ["x"], {}, "only decoders and policies generate"),
    "two decoders at once": (["right+wrong"], ["x"], {}, "right and wrong both choose the next token"),
    "no prompt": (["right"], [], {}, "prompt is empty"),
    "an empty prompt": (["right"], ["x", "  "], {}, "prompt is empty"),
    "too long a context": (["right"], ["x" * 90], {"max_new_tokens": 10}, "90 tokens and 10 .* 96 positions"),
}


@pytest.mark.parametrize("names, prompts, options, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused(decoders, names, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        compare(names, "toy", None, prompts, small(**options))


OUTSIDE = [("max_new_tokens", 0), ("batch", 0), ("repeats", 0), ("temperature", -1), ("top_p", 0.0), ("top_p", 1.1)]


@pytest.mark.parametrize("name, value", [*OUTSIDE, ("top_k", -1)])
def test_options_outside_their_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Options(**{name: value})


def test_a_draft_with_another_tokenizer_is_refused(decoders, monkeypatch):
    def load(name, dtype):
        tokenizer = toys.tokenizer()
        if name == "other":
            tokenizer.add_tokens(["zebra"])
        return toys.model(), tokenizer

    monkeypatch.setattr(module, "load_model", load)
    with pytest.raises(ValueError, match=r"other \(258 tokens\) does not share the tokenizer of toy .*zebra"):
        compare(["right"], "toy", "other", ["x"], small())


def test_the_zoo_has_a_draft_for_methods_that_need_one(decoders):
    assert default_drafts("zoo:code-target", ["full", "right"]) == {"causal": "zoo:code-draft"}
    assert default_drafts("zoo:code-target", ["full"]) == {}
    assert default_drafts("code-target", ["right"]) == {}
    given = {"question": "decode", "shape": "decoder", "exactness": "lossless", "paper": card.Paper("filler")}
    card.method(**given, name="filler", needs={"diffusion_draft"})(type("Filler", (), {"__module__": "tests"}))
    assert default_drafts("zoo:code-target", ["filler"]) == {"diffusion": "zoo:code-diffusion"}
    assert set(default_drafts("zoo:code-target", ["filler", "right"])) == {"causal", "diffusion"}


def test_a_diffusion_draft_may_have_a_mask_of_its_own(decoders, monkeypatch):
    given = {"question": "decode", "shape": "decoder", "exactness": "lossless", "paper": card.Paper("filler")}
    card.method(**given, name="filler", needs={"diffusion_draft"})(type("Filler", (), {"__module__": "tests"}))

    def load(name, options):
        tokenizer, model = toys.tokenizer(), toys.model()
        if name == "masked":
            tokenizer.add_special_tokens({"mask_token": "<mask>"})
            model.config.is_causal = False
        return model, tokenizer

    monkeypatch.setattr(module, "load_model", load)
    found = compare(["filler"], "toy", "masked", ["x"], small())
    assert found.draft == "masked" and found.runs[-1].identical
    with pytest.raises(ValueError, match=r"masked \(258 tokens\) does not share the tokenizer of toy"):
        compare(["right"], "toy", "masked", ["x"], small())


def test_the_zoo_has_what_was_trained_beside_a_model():
    load_methods()
    assert default_beside("zoo:code-target", ["stop_exit", "generate"]) == {"controller": "zoo:code-stop"}
    assert default_beside("zoo:code-target", ["full+duo_llm"]) == {"modules": "zoo:code-duo"}
    assert default_beside("zoo:code-draft", ["duo_llm", "stop_exit"]) == {}
    assert default_beside("zoo:code-target", ["skipdecode"]) == default_beside("somewhere", ["stop_exit"]) == {}
    beside = default_beside("zoo:reasoning-think", ["think_at_hard"])
    assert set(beside) == {"decider", "lora"} and default_beside("zoo:reasoning", ["think_at_hard"]) == {}
    assert default_beside(beside["lora"], ["think_at_hard"]) == beside
    assert make_side("think_at_hard", "causal", Given(beside=beside)).policies[0].weights is not None
    given = Given(beside=default_beside("zoo:code-target", ["stop_exit", "random_modules"]))
    assert make_side("stop_exit", "causal", given).alone.classifier is not None
    assert make_side("random_modules", "causal", given).alone.duo.layers == 12


def test_what_policies_decide_is_recorded(kinds):
    found = compare(["full+skip_layers", "skip_layers"], "toy", None, ["x = 1", "for"], small())
    by_name = {trace.about["method"]: trace for trace in found.traces}
    assert set(by_name) == {
        "full",
        "full+skip_layers",
        "full+skip_layers: SkipLayers",
        "skip_layers",
        "skip_layers, attached",
    }
    assert {step.decision.kind for step in by_name["full+skip_layers"].steps} == {"commit"}
    for name in ("full+skip_layers: SkipLayers", "skip_layers, attached"):
        assert {step.decision.kind for step in by_name[name].steps} == {"depth"}
        assert len(by_name[name].about["rows"]) == 2 and by_name[name].about["runs"]
    pieces_of = lambda name: ["".join(row["output"]) for row in by_name[name].about["rows"]]  # noqa: E731
    assert pieces_of("full+skip_layers: SkipLayers") == pieces_of("full+skip_layers")
    assert pieces_of("skip_layers, attached") == pieces_of("full+skip_layers")


def test_a_configuration_is_one_more_side(kinds):
    config = Config("skip_layers", {"budget": Budget(layers=1)}, "toy")
    found = compare(["full"], "toy", None, ["x = 1"], small(config=config))
    assert [run.name for run in found.runs] == ["generate", "full", "skip_layers budget=layers=1"]
    assert found.runs[2].flops < found.runs[0].flops and found.runs[2].identical is False
    json.dumps(found.to_json(), allow_nan=False, default=str)
    same = compare(["full"], "toy", None, ["x = 1"], small(config=Config("full", {}, "toy")))
    assert [run.name for run in same.runs] == ["generate", "full"]


def test_pieces_join_to_the_text_and_keep_characters_whole():
    tokenizer = toys.tokenizer()
    text = "s = 'é→𝄞'\n\tpass  # done"
    found = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(found) == text
    assert "→" in found and "𝄞" in found
    assert len(found) == len(text.encode())
    assert pieces(tokenizer, []) == []
    assert pieces(tokenizer, tokenizer("é")["input_ids"][:1]) == ["\ufffd"]


def test_prompts_of_a_file(tmp_path):
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\n  two\n")
    rows.write_text('{"prompt": "line\\nbreak"}\n{"prompt": "b", "more": 1}\n')
    assert read_prompts(plain) == ["one", "  two"]
    assert read_prompts(rows) == ["line\nbreak", "b"]


def test_answers_of_a_file(tmp_path):
    tabs, rows = tmp_path / "a.tsv", tmp_path / "a.jsonl"
    tabs.write_text("one\tuno\ntwo\tdos y medio\n")
    rows.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "completion": ""}\n')
    assert read_examples(tabs) == [Example("one", "uno"), Example("two", "dos y medio")]
    assert read_examples(rows) == [Example("a", "b"), Example("c", "")]


UNREADABLE = {
    "bytes.txt": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "half.tsv": (b"a\tb\nc\n", "line 2 has no answer, others have"),
    "number.jsonl": (b'{"prompt": 5}', "line 1 is not an object"),
    "blank.jsonl": (b'{"prompt": " "}', "line 1 has an empty prompt"),
    "empty.txt": (b"\n\n", "holds no prompt"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_data_is_said_to_be_so(tmp_path, name):
    text, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)
    with pytest.raises(ValueError, match="is a directory"):
        read_examples(tmp_path)


@pytest.mark.parametrize("text", ['{"prompt": 1', '{"text": "x"}', "[1]"])
def test_a_malformed_line_is_named(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "fine"}\n' + text)
    with pytest.raises(ValueError, match=r"a\.jsonl line 2"):
        read_prompts(path)


def test_a_file_without_prompts_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "a.txt")


def test_the_demo_goes_on_from_held_out_source():
    from pertoken.bench import demo
    from pertoken.zoo import corpus

    prompt = demo.prompt()
    assert prompt.startswith("def ") and prompt.endswith("\n")
    assert prompt in corpus.split_texts("heldout")[demo.SOURCE]
    assert demo.CHARACTERS <= len(prompt) < 2 * demo.CHARACTERS


def test_policies_are_attached_under_a_decoder_and_taken_off(decoders, monkeypatch):
    from dataclasses import dataclass

    from pertoken.core.policy import Policy

    @dataclass(frozen=True)
    class Zero(Policy):
        """Makes every logit zero but one."""

        budget: Budget = Budget()
        reads = frozenset()
        writes = frozenset({"logits"})

        def decide(self, view): ...

        def install(self, model, attachment):
            def around(forward, hidden):
                return torch.nn.functional.one_hot(torch.full(hidden.shape[:2], 65), 257).float()

            attachment.wrap(model.lm_head, around)

    given = {"question": "depth", "shape": "policy", "exactness": "approximate", "paper": card.Paper("x")}
    card.method(**given, name="zero")(Zero)
    found = compare(["right+zero", "right"], "toy", None, ["x"], small())
    assert [run.identical for run in found.runs] == [True, True, False, True]
    assert len(set(found.outputs["right+zero"][0])) == 1


FILLED, INSERTED = "toy-diffusion", "toy-insertion"


@pytest.fixture
def kinds(monkeypatch):
    """Toy models of every kind in place of loaded ones: plain "toy", one that fills in, one that inserts."""

    def load(name, options):
        model = toys.model()
        if name in (FILLED, INSERTED):
            model.config.is_causal, model.config.mask_token_id = False, 256
        if name == INSERTED:
            model.config.stop_token_id = 0
        return model, toys.tokenizer()

    monkeypatch.setattr(module, "load_model", load)


def filling(**changed) -> Options:
    return small(**({"max_new_tokens": 8, "block": 4} | changed))


def test_a_diffusion_model_is_measured_by_one_commit_per_step_without_a_cache(kinds):
    found = compare(["schedule", "schedule+dual_cache", "entropy"], FILLED, None, ["def f(x):", "x"], filling())
    dense, same, cached, other = found.runs
    assert [run.name for run in found.runs] == ["dense", "schedule", "schedule+dual_cache", "entropy"]
    assert dense.label == "one per step, no cache" and found.options.baseline == "dense"
    assert (dense.identical, dense.agreement, dense.speedup) == (True, 1.0, pytest.approx(1))
    assert (same.identical, same.flops, same.steps) == (True, dense.flops, dense.steps == 8 and 8)
    assert cached.flops < dense.flops
    assert other.identical == (found.outputs["entropy"] == found.outputs["dense"])
    assert other.agreement == pytest.approx(1.0) if other.identical else 0 <= other.agreement < 1
    assert [trace.about["method"] for trace in found.traces] == [run.name for run in found.runs]
    json.dumps(found.to_json(), allow_nan=False)


def test_steps_are_the_methods_own_and_not_the_references(kinds):
    found = compare(["schedule"], FILLED, None, ["x"], filling(steps=4))
    assert [run.steps for run in found.runs] == [8, 4]


def test_another_baseline_can_be_named_for_a_diffusion_model(kinds):
    found = compare(["schedule+dual_cache"], FILLED, None, ["x"], filling(baseline="random_commit"))
    assert [run.name for run in found.runs] == ["dense", "random_commit", "schedule+dual_cache"]
    assert found.runs[1].speedup == pytest.approx(1)


def test_methods_get_the_filter_and_the_tokenizer(kinds, tmp_path):
    from pertoken.denoise.learn2pd import Filter

    Filter(4).save(tmp_path / "f.safetensors")
    options = filling(filter=str(tmp_path / "f.safetensors"), language="python")
    found = compare(["learn2pd", "difftester"], FILLED, None, ["x"], options)
    assert [run.tokens for run in found.runs] == [8, 8, 8]


def test_the_zoo_has_filters_by_size_of_block(kinds, tmp_path, monkeypatch):
    monkeypatch.setattr("pertoken.zoo.WEIGHTS", tmp_path)
    (tmp_path / "code-filter").mkdir()
    (tmp_path / "code-filter" / "filter-32.safetensors").touch()
    names = ["dense", "learn2pd+dual_cache"]
    kept = str(tmp_path / "code-filter" / "filter-32.safetensors")
    assert default_filter("zoo:code-diffusion", names, 32) == kept
    assert default_filter("zoo:code-diffusion", names, 16) is None
    assert default_filter("zoo:code-diffusion", ["threshold"], 32) is None
    assert default_filter("code-diffusion", names, 32) is None


def test_an_insertion_model_gives_whole_texts(kinds):
    found = compare([], INSERTED, None, ["def f(x):", "x"], small(max_new_tokens=5))
    (run,) = found.runs
    assert run.name == "ilm" and run.identical and 0 <= run.tokens <= 10
    assert [text[:1] for text in found.outputs["ilm"]] == ["d", "x"]
    assert len("".join(found.outputs["ilm"])) >= len("def f(x):x")


WRONG_KIND = {
    "a canvas for a causal model": (
        ["threshold"],
        "toy",
        {},
        "threshold fills in a canvas and .*del",
    ),
    "a causal method for a canvas": (["prompt_lookup"], FILLED, {}, "prompt_lookup goes on from the left .*threshold"),
    "a policy alone": (
        ["skip_layers"],
        FILLED,
        {},
        r"run as lossless\(skip_layers\), which goes on",
    ),
    "a canvas for insertion": (["threshold"], INSERTED, {}, "toy-insertion is an insertion model"),
    "transformers' loop for a canvas": (["schedule"], FILLED, {"baseline": "generate"}, "its own is dense"),
    "the canvas' loop for a causal model": (["full"], "toy", {"baseline": "dense"}, "its own is generate"),
    "a block for a causal model": (["full"], "toy", {"block": 4}, "settings of a canvas; toy is a causal model"),
    "two rules of one slot": (["threshold+factor"], FILLED, {}, "threshold and factor both decide commit"),
    "methods of two kinds": (["threshold+dyspec"], FILLED, {}, "need models of different kinds"),
    "no filter": (["learn2pd"], FILLED, {}, "learn2pd needs a filter"),
    "a block that does not fit": (["schedule"], FILLED, {"block": 3}, "block=3 does not divide the canvas of 8"),
}


@pytest.mark.parametrize("names, model, options, message", WRONG_KIND.values(), ids=WRONG_KIND.keys())
def test_methods_and_models_of_different_kinds_are_refused(kinds, names, model, options, message):
    with pytest.raises(ValueError, match=message):
        compare(names, model, None, ["x"], small(**({"max_new_tokens": 8} | options)))


def test_policies_go_under_a_canvas(kinds):
    found = compare(["schedule+skip_layers"], FILLED, None, ["x = 1"], filling())
    assert found.runs[1].flops < found.runs[0].flops


def test_agreement_counts_positions():
    assert agreement([[1, 2, 3], [4]], [[1, 9, 3], [4]]) == 0.75
    assert agreement([[1, 2]], [[1, 2, 3, 4]]) == 0.5
    assert agreement([[]], [[]]) == 1.0


def test_a_policy_that_evicts_runs_under_the_plain_loop():
    load_methods()
    alone, drafting = (make_side(name, "causal", Given()) for name in ("h2o", "skip_layers"))
    assert alone.decoder is None and len(alone.policies) == 1 and alone.label == "h2o under generate"
    assert drafting.decoder is not None and not drafting.policies and drafting.label == "lossless skip_layers"
