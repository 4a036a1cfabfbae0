import pytest

from pertoken.bench import claims
from pertoken.core import card


class Toy:
    """A method that does nothing.

    It exists to be claimed about.
    """


@pytest.fixture
def toy(monkeypatch):
    """A registry that holds the method `toy` alone and no claims; returns the decorator for its claims."""
    monkeypatch.setattr(card, "_REGISTRY", {})
    monkeypatch.setattr(claims, "_CLAIMS", {})
    paper = card.Paper("Toys", "2400.00001")
    card.method(question="decode", shape="decoder", exactness="lossless", paper=paper, name="toy", needs={"draft"})(Toy)

    def toy_claim(sentence: str, **changed):
        given = {"claim": sentence, "metric": "tokens per step", "expected": "> 1"}
        return claims.claim("toy", **(given | changed))

    return toy_claim
