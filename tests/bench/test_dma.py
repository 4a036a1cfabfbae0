"""A quick run of DMA's claims trains nothing: those that need a trained model say how to get it."""

from __future__ import annotations

import pytest

from pertoken.bench import dma
from pertoken.bench.claims import Bench, claims_of
from pertoken.core.errors import BadRequest
from pertoken.zoo import train

NEED = {
    dma.as_good_as_dense: "reading",
    dma.above_window_on_code: "reading",
    dma.above_random: "reading-dma",
    dma.recalls: "associating-dma",
    dma.retrofitted: "recall-dma",
    dma.associates_at_2k: "recall-dma",
}


@pytest.mark.parametrize("measure", NEED, ids=lambda measure: measure.__name__)
def test_a_quick_run_names_the_model_it_needs(measure, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(train.Run, "__init__", None)
    with pytest.raises(BadRequest, match=rf"pertoken zoo train {NEED[measure]}[a-z-]* --no-compile --out {tmp_path}"):
        measure(Bench(quick=True))


def test_every_other_claim_needs_none():
    others = [claim.measure for claim in claims_of("dma") if claim.measure not in NEED]
    assert others == [dma.exact, dma.causal, dma.faster_from, dma.large_layers_faster_from]
