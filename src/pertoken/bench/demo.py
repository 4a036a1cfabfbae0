"""The demonstration: several decoders on the packaged code model, continuing real Python that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable

from pertoken.bench.compare import PLAIN, Comparison, Options, compare
from pertoken.zoo.corpus import heldout_names, read_source, source_files

MODEL, DRAFT = "zoo:code-target", "zoo:code-draft"
METHODS = ["full", "prompt_lookup", "dyspec", "del"]
SOURCE = "posixpath.py"
CHARACTERS = 700


def prompt() -> str:
    """The middle of a held-out file of the standard library, cut at the start of a line."""
    if SOURCE not in heldout_names():
        raise ValueError(f"{SOURCE} may have been trained on; name a file of zoo/heldout.txt as the demo's source")
    text = read_source(source_files()[SOURCE]) or ""
    start = text.index("\ndef ", len(text) // 3) + 1
    end = text.index("\n    ", start + CHARACTERS) + 1
    return text[start:end]


def demo(quick: bool = False, status: Callable[[str], None] = lambda text: None) -> Comparison:
    """Plain generation, the baselines and the two speculative decoders, greedily, in under a minute on two cores."""
    options = Options(max_new_tokens=48 if quick else 128, dtype="fp32", baseline=PLAIN, repeats=1 if quick else 3)
    return compare(METHODS, MODEL, DRAFT, [prompt()], options, status)
