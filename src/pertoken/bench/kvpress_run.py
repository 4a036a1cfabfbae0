"""What a press of kvpress answers, as a program of its own: kvpress needs an older transformers than pertoken.

    python kvpress_run.py MODEL CONTEXTS.safetensors < requests.json > answers.json

MODEL: a directory in Hugging Face format; contexts: ids `[row, token]`, questions `[row, question, token]` and before
`[1]`, tokens of a question ahead of its answer. A request is the name of a press, its settings and nothing else; the
answer to each is the share of questions of which every token is right, greedy, behind the right ones before it. As its
own pipeline does, the press compresses the context, and questions are asked behind it one by one.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any


def answered(model: Any, press: Any, ids: Any, questions: Any, before: int) -> list[bool]:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        with press(model):
            model.model(input_ids=ids[None], past_key_values=cache)
        found = []
        for question in questions:
            own = copy.deepcopy(cache)
            held = own.get_seq_length()
            text = question[None, :-1]
            places = torch.arange(len(ids), len(ids) + text.shape[1])
            out = model(
                input_ids=text,
                past_key_values=own,
                position_ids=places[None],
                cache_position=torch.arange(held, held + text.shape[1]),
            )
            guessed = out.logits[0, before - 1 :].argmax(-1)
            found.append(bool((guessed == question[before:]).all()))
    return found


def main(model_path: str, contexts: str) -> None:
    import kvpress
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, local_files_only=True).eval()
    told, answers = load_file(contexts), []
    for name, settings in json.load(sys.stdin):
        press, right = getattr(kvpress, name)(**settings), []
        for ids, questions in zip(told["ids"], told["questions"], strict=True):
            right += answered(model, press, ids, questions, int(told["before"]))
        answers.append(sum(right) / len(right))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
