"""The words of scenes and clips, one token each: the tokenizer of the models that see."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken.zoo.scenes import COLOURS, MOST, PLACES, SHAPES, WAYS

PAD, END, IMAGE, VIDEO = "<pad>", "<end>", "<image>", "<video>"
SPECIAL = (PAD, END, IMAGE, VIDEO)
OTHERS = (
    "how",
    "many",
    "what",
    "colour",
    "is",
    "the",
    "where",
    "does",
    "go",
    "first",
    "then",
    "describe",
    "?",
    ".",
    "nothing",
)
WORDS = (
    *SPECIAL,
    *OTHERS,
    "thing",
    "things",
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    *COLOURS,
    *PLACES,
    *(way for way in WAYS if way not in PLACES),
    *map(str, range(MOST + 1)),
)
NUMBER = {word: number for number, word in enumerate(WORDS)}


def encoded(text: str) -> list[int]:
    """The numbers of words with spaces between; raises `KeyError` for another word."""
    return [NUMBER[word] for word in text.split()]


def tokenizer() -> PreTrainedTokenizerFast:
    """As a tokenizer of transformers."""
    made = Tokenizer(models.WordLevel(NUMBER, unk_token=PAD))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        unk_token=PAD,
        eos_token=END,
        additional_special_tokens=[IMAGE, VIDEO],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def save(directory: Path) -> None:
    """The tokenizer beside a model."""
    tokenizer().save_pretrained(directory)
