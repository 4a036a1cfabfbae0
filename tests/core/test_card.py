import pytest

from pertoken.core import card as cards_module
from pertoken.core.card import Paper, card, cards, method


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """An empty registry for the length of a test."""
    monkeypatch.setattr(cards_module, "_REGISTRY", {})


def made(name: str, module: str = "pertoken.decode.one", doc: str | None = "First line.\n\nMore.") -> type:
    return type(name, (), {"__module__": module, "__doc__": doc})


def register(build: type, **changed):
    given = {"question": "decode", "shape": "decoder", "exactness": "lossless", "paper": Paper("A paper", "2400.00001")}
    return method(**(given | changed))(build)


def test_a_method_is_named_after_its_file():
    build = register(made("DEL", "pertoken.decode.del_"))
    assert card("del").build is build
    assert card("del").summary == "First line."


def test_a_name_can_be_given():
    register(made("KAryTree"), name="kary_tree", reads={"logits"}, needs={"draft"}, baseline=True)
    one = card("kary_tree")
    assert (one.reads, one.needs, one.baseline) == (frozenset({"logits"}), frozenset({"draft"}), True)


def test_summary_without_docstring_is_empty():
    register(made("Silent", doc=None), name="silent")
    assert card("silent").summary == ""


def test_an_unknown_name_suggests_the_nearest():
    for name in ("dyspec", "diffuspec", "xgrammar"):
        register(made(name), name=name)
    with pytest.raises(ValueError, match=r"'dyspek' is unknown; did you mean dyspec"):
        card("dyspek")
    with pytest.raises(ValueError, match="known methods: diffuspec, dyspec, xgrammar"):
        card("qqqq")


def test_a_name_is_taken_once():
    register(made("One", "pertoken.decode.one"), name="same")
    with pytest.raises(ValueError, match=r"'same' is taken by pertoken\.decode\.one"):
        register(made("Other", "pertoken.depth.other"), name="same")


def test_a_file_may_be_imported_again():
    register(made("One"), name="same")
    again = register(made("One"), name="same")
    assert card("same").build is again


def test_two_methods_of_one_file_need_two_names():
    register(made("One", "pertoken.decode.shared"))
    with pytest.raises(ValueError, match="'shared' is taken"):
        register(made("Two", "pertoken.decode.shared"))


@pytest.mark.parametrize(
    "field, value", [("question", "why"), ("shape", "round"), ("exactness", "nearly")], ids=lambda v: str(v)
)
def test_unknown_words_on_a_card_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}='{value}' is unknown; choose one of"):
        register(made("One"), **{field: value})


def test_cards_are_sorted_by_question_then_baselines_last():
    register(made("z"), name="z")
    register(made("b"), name="b", baseline=True)
    register(made("a"), name="a", baseline=True)
    register(made("c"), name="c", question="depth", shape="policy")
    assert list(cards()) == ["c", "z", "a", "b"]
