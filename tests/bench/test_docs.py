import json
import xml.etree.ElementTree as ElementTree

import pytest

from pertoken.bench import catalogue, claims, docs, results
from pertoken.bench.claims import Measurement
from pertoken.bench.curve import write_curve
from pertoken.bench.runner import run
from pertoken.core import card


@pytest.fixture
def checkout(toy, tmp_path, monkeypatch):
    """A checkout with one method, one measured claim and one that is not."""
    monkeypatch.setattr(catalogue, "load_methods", lambda: None)
    (tmp_path / "pyproject.toml").write_text('name = "pertoken"')
    toy("a | b is fast")(lambda bench: Measurement(3.0, "full", 2.0, 5))
    run(["toy"], directory=tmp_path / "results")
    toy("never run", expected=">= 2", compare="value")(lambda bench: pytest.fail("measured"))
    return tmp_path


def test_entries_hold_everything_about_a_method(checkout):
    (one,) = catalogue.entries(checkout / "results")
    assert {
        "name",
        "question",
        "shape",
        "paper",
        "exactness",
        "reads",
        "writes",
        "needs",
        "families",
        "baselines",
    } <= set(one)
    assert one["paper"] == {"title": "Toys", "arxiv": "2400.00001"}
    assert one["needs"] == ["draft"] and "llama" in one["families"]
    measured, open_ = one["claims"]
    assert measured["result"]["ratio"] == 1.5 and open_["result"] is None
    assert catalogue.headline(one) == "1/2 claims hold; tokens per step 3 against 2 (full)"
    json.dumps(one)


def test_headlines_without_results(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "load_methods", lambda: None)
    (one,) = catalogue.entries(tmp_path)
    assert one["measured"] is None and catalogue.headline(one) == "not measured here"
    assert catalogue.headline(one | {"baseline": True}) == "a baseline"


@pytest.mark.parametrize(
    "value, text", [(None, "-"), (3.0, "3"), (1.23456, "1.235"), (1e-7, "1e-07"), (12345.678, "1.235e+04")]
)
def test_numbers_have_four_digits(value, text):
    assert catalogue.number(value) == text


def test_pages_tell_card_docstring_and_results(checkout):
    made = docs.pages(checkout / "results")
    assert set(made) == {"toy.md", "README.md"}
    page = made["toy.md"]
    assert "# toy" in page and "It exists to be claimed about." in page
    assert "[Toys](https://arxiv.org/abs/2400.00001)" in page
    assert "| a \\| b is fast | tokens per step | > 1 | 3 | 2 (full) | 1.5 | holds | 5 |" in page
    assert "| never run | tokens per step | >= 2 | not measured |" in page
    assert f"torch {results.versions()['torch']}" in page
    assert "[toy](toy.md)" in made["README.md"]
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_a_bench_of_many_methods_has_a_page_with_its_table(checkout, monkeypatch):
    monkeypatch.setattr(claims, "BENCHES", {"many": "spending"})
    for module in (catalogue, docs):
        monkeypatch.setattr(module, "BENCHES", claims.BENCHES)
    lines = [{"side": "full", "exact": 0.25}, {"side": "a | b", "exact": None}]
    found = Measurement(1.0, "full", 1.0, 2, {"table": lines})
    claims.claim("many", claim="all of them", metric="share", expected="== 1", shown=True)(lambda bench: found)
    assert "many.md" not in docs.pages(checkout / "results"), "it was not measured"
    run(["many"], directory=checkout / "results")
    made = docs.pages(checkout / "results")
    assert "| full | 0.25 |" in made["many.md"] and "| a \\| b | - |" in made["many.md"]
    assert "all of them" in made["many.md"] and "[many](many.md)" in made["README.md"]
    front = docs.readme(f"{docs.START}\n{docs.END}", checkout / "results")
    assert "[many](docs/methods/many.md) | all of them" in front


def test_settings_come_from_the_fields_or_the_signature(toy):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Fields:
        """Has fields."""

        size: int = 64
        draft: object | None = None

    class Plain:
        """Has none."""

        def __init__(self, steps, rate=0.5):
            pass

    given = {"question": "decode", "shape": "decoder", "exactness": "lossless", "paper": card.Paper("x")}
    card.method(**given, name="fields")(Fields)
    card.method(**given, name="plain")(Plain)
    assert [row[::2] for row in docs._settings(card.card("fields"))] == [("`size`", "`64`"), ("`draft`", "`None`")]
    assert [row[::2] for row in docs._settings(card.card("plain"))] == [("`steps`", "required"), ("`rate`", "`0.5`")]


def test_docs_are_idempotent_and_checked(checkout, capsys):
    root = ["--root", str(checkout)]
    folder = checkout / "docs" / "methods"
    assert docs.main([*root, "--check"]) == 1
    assert not folder.exists()
    assert docs.main(root) == 0
    assert docs.main([*root, "--check"]) == 0
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert docs.main(root) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    (folder / "toy.md").write_text("stale")
    (folder / "gone.md").write_text(docs.MARK + "\n# gone")
    (folder / "by_hand.md").write_text("# kept")
    assert docs.main([*root, "--check"]) == 1
    assert "toy.md, gone.md" in capsys.readouterr().err
    assert docs.main(root) == 0
    assert {path.name for path in folder.iterdir()} == {"toy.md", "README.md", "by_hand.md"}


def test_docs_outside_a_checkout_need_a_root(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert docs.main([]) == 2
    assert "--root" in capsys.readouterr().err


def test_loss_curves(tmp_path):
    curve = [{"step": 10, "seconds": 1.0, "train": 5.0}, {"step": 20, "seconds": 2.0, "train": 4.0, "heldout": 4.5}]
    table, picture = write_curve(curve, tmp_path)
    assert table.read_text().splitlines() == ["step,seconds,train,heldout", "10,1.0,5.0,", "20,2.0,4.0,4.5"]
    names = [text.text for text in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert {"train", "heldout", "20", "5.00", "4.00"} <= set(names)


def test_an_empty_loss_curve_is_drawn_all_the_same(tmp_path):
    table, picture = write_curve([], tmp_path)
    assert table.read_text().strip() == ""
    ElementTree.parse(picture)


def test_zoo_models_are_known_by_name():
    names = [one["name"] for one in catalogue.zoo_entries()]
    assert {"code-target", "code-draft"} <= set(names)
    assert catalogue.recipe("code-draft").teacher == "code-target"
    with pytest.raises(ValueError, match="did you mean code-draft"):
        catalogue.recipe("code-draf")


def test_defaults_read_the_same_in_every_process():
    assert docs._shown(frozenset({"b", "a", "c"})) == "{'a', 'b', 'c'}"
    assert docs._shown(lambda text: None) == "a function"
    assert docs._shown(0.5) == "0.5"
