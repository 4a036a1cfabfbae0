"""Decoders by name: rules in their slots, what they need, settings that go to whoever has them."""

from __future__ import annotations

import pytest

from pertoken.core.errors import BadRequest
from pertoken.denoise import make
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.elastic_cache import ElasticCache
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.ilm import ILM
from pertoken.denoise.learn2pd import Filter, Learn2PD
from pertoken.denoise.loop import Denoise
from pertoken.denoise.recompute import Recompute
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.threshold import Threshold


def test_a_rule_alone_gets_defaults_for_the_rest():
    assert make("threshold") == Denoise(Threshold())
    assert make("dual_cache") == Denoise(refresh=DualCache())


def test_rules_stand_in_their_slots_in_any_order():
    wanted = Denoise(Threshold(), DualCache(), EndOfText())
    assert make("threshold+dual_cache+end_of_text") == make("end_of_text+dual_cache+threshold") == wanted


def test_what_a_rule_wants_beside_it_holds_unless_it_is_named():
    rule = ElasticCache()
    assert make("elastic_cache") == Denoise(rule.beside["commit"], rule, rule.beside["canvas"])
    assert make("elastic_cache+schedule") == Denoise(Schedule(), rule, rule.beside["canvas"])


def test_settings_go_to_the_loop_or_to_the_rule_that_has_them():
    made = make("threshold+dual_cache", tau=0.5, block=8, steps=16)
    assert made == Denoise(Threshold(0.5), DualCache(), block=8, steps=16)
    assert make("origin", steps=16).commit.steps is None, "the loop's steps are not the rule's"


def test_needs_are_served_by_name_and_ignored_by_others():
    net = Filter(4)
    assert make("learn2pd", filter=net).commit == Learn2PD(net)
    assert make("threshold", filter=net, tokenizer="t", language="java") == Denoise(Threshold())
    tester = make("difftester", tokenizer="t", language="java").commit
    assert (tester.tokenizer, tester.language) == ("t", "java")


def test_a_method_that_is_no_rule_is_built_as_it_is():
    assert make("ilm", threshold=0.5, filter=Filter(4)) == ILM(0.5)


REFUSED = {
    "two rules of one slot": ("threshold+schedule", {}, "threshold and schedule both decide commit"),
    "no filter": ("learn2pd", {}, r"learn2pd needs a filter: give filter=\.\.\. \(--filter on the command line\)"),
    "no tokenizer": ("difftester+dual_cache", {}, "difftester needs a tokenizer"),
    "a setting nobody has": ("threshold", {"tao": 1}, "tao is no setting of threshold; there are block, .*tau"),
    "a sum with what is no rule": ("threshold+ilm", {}, "ilm is no rule of the denoising loop"),
}


@pytest.mark.parametrize(("name", "options", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(name, options, says):
    with pytest.raises(BadRequest, match=says):
        make(name, **options)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="'thresold' is unknown; did you mean threshold"):
        make("thresold")


def test_defaults_compute_everything_one_position_per_step():
    plain = make("recompute")
    assert plain == Denoise() and plain.refresh == Recompute() and plain.steps is None
