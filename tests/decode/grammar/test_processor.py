"""The logits processor in transformers' own modes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pertoken.core.errors import BadRequest
from pertoken.decode import make
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.matcher import Matcher
from pertoken.decode.grammar.processor import GrammarProcessor
from pertoken.decode.grammar.vocabulary import Vocabulary

WORDS = [b"[", b"]", b"a", b"ab", b",", b"],", b"[[", b"a,", b"b", None, None]
END, SIZE = 9, 16
SOURCE = 'root ::= "[" (item ("," item)*)? "]"\nitem ::= root | "a" "b"?'


def model(seed, layers=1):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=256, eos_token_id=END, pad_token_id=10, bos_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = END, 10
    return made


@pytest.fixture(scope="module")
def engine():
    return Engine(gbnf(SOURCE), Vocabulary(WORDS, ends=(END,)))


def processor(engine):
    return GrammarProcessor(lambda: Matcher(engine), engine.vocabulary.size)


def check(engine, ids):
    matcher = Matcher(engine)
    for token in ids:
        if matcher.finished:
            break
        assert matcher.accept(int(token)), ids
    return matcher


PROMPT = torch.tensor([[10, 10, 8, 3, 4], [2, 8, 0, 8, 1], [10, 7, 7, 2, 2]])


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
def test_batches_and_beams_stay_in_the_grammar(engine, options):
    torch.manual_seed(0)
    mask = (PROMPT != 10).long()
    out = model(1).generate(
        PROMPT, attention_mask=mask, max_new_tokens=20, logits_processor=[processor(engine)], **options
    )
    for row in out[:, PROMPT.shape[1] :]:
        check(engine, row)
    assert len({tuple(row) for row in out[:, 5:].tolist()}) > 1


def test_a_row_of_a_batch_is_as_alone(engine):
    mask = (PROMPT != 10).long()
    target = model(1)
    out = target.generate(PROMPT, attention_mask=mask, max_new_tokens=16, logits_processor=[processor(engine)])
    for row in range(3):
        ids = PROMPT[row : row + 1][:, mask[row].bool()]
        alone = target.generate(ids, max_new_tokens=16, logits_processor=[processor(engine)])
        new = alone[0, ids.shape[1] :]
        assert torch.equal(out[row, 5 : 5 + len(new)], new)


def test_assisted_generation_gives_the_same(engine):
    target, draft = model(1, 2), model(2)
    plain = target.generate(PROMPT[1:2], max_new_tokens=24, logits_processor=[processor(engine)])
    assisted = target.generate(
        PROMPT[1:2], max_new_tokens=24, logits_processor=[processor(engine)], assistant_model=draft
    )
    assert torch.equal(plain, assisted)
    check(engine, plain[0, 5:])


def test_a_vocabulary_that_cannot_go_on_names_the_row():
    words = [b"[", b"a", None, None]
    stuck = Engine(gbnf(SOURCE), Vocabulary(words, ends=(3,)))
    begin = GrammarProcessor(lambda: Matcher(stuck), 4)
    begin(torch.tensor([[1], [1]]), torch.zeros(2, 4))
    with pytest.raises(BadRequest, match="new one for each call"):
        begin(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 4))
    words = [b"[", b"a,", None, None]
    stuck = Engine(gbnf('root ::= "[" ("a" "]" | "a,b" | "[")'), Vocabulary(words, ends=(3,)))
    begin = GrammarProcessor(lambda: Matcher(stuck), 4)
    begin(torch.tensor([[1], [1]]), torch.zeros(2, 4))
    begin(torch.tensor([[1, 0], [1, 0]]), torch.zeros(2, 4))
    with pytest.raises(BadRequest, match=r"row 1, after 2 tokens: no token"):
        begin(torch.tensor([[1, 0, 0], [1, 0, 1]]), torch.zeros(2, 4))


@pytest.mark.parametrize("name", ["prompt_lookup", "dyspec", "kary_tree", "chain"])
def test_token_trees_give_what_plain_decoding_under_the_grammar_gives(engine, name):
    target, mask = model(1, 2), (PROMPT != 10).long()
    options = {"attention_mask": mask, "max_new_tokens": 24}
    plain = target.generate(PROMPT, logits_processor=[processor(engine)], **options)
    decoder = make(name, draft=model(2))
    guessed = target.generate(PROMPT, logits_processor=[processor(engine)], custom_generate=decoder, **options)
    assert torch.equal(plain, guessed)
