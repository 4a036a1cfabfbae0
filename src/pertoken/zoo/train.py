"""Train a zoo model from its recipe: resumable, with a progress bar and loss curves.

A run lives in one directory: `state.safetensors` (weights and optimizer tensors), `state.json` (step and curve). It is
written every `save_every` steps and on Ctrl-C, and a later run with the same recipe goes on from there.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pertoken.zoo import corpus, layers, model_path
from pertoken.zoo.answering import AnsweringTokens
from pertoken.zoo.causal import Causal
from pertoken.zoo.insertion import Insertion
from pertoken.zoo.masked import MASK, MaskedTokens
from pertoken.zoo.next_token import NextToken
from pertoken.zoo.objective import Objective
from pertoken.zoo.recalling import RecallAnswers
from pertoken.zoo.recipe import RECIPES, Recipe, Shape
from pertoken.zoo.solving import Solving

OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "masked": MaskedTokens,
    "answering": AnsweringTokens,
    "causal": Causal,
    "insertion": Insertion,
    "recall": RecallAnswers,
    "reasoning": Solving,
}
MASKED = ("masked", "answering", "insertion")  # objectives whose tokenizer holds the mask token
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks: training allocates the same large tensors each step, and handing them back to the
    system costs up to half of the step. Does nothing on another C library."""
    try:
        libc = ctypes.CDLL(ctypes.util.find_library("c"))
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**27)
    except (OSError, AttributeError, TypeError):
        return


def completed(saved: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it was saved, with the defaults of settings that recipes did not have then."""
    shape = Shape(**saved["shape"])
    return json.loads(json.dumps(asdict(Recipe(shape, steps=0)) | saved | {"shape": asdict(shape)}))


class RunInterrupted(Exception):
    """Raised after Ctrl-C once the run's state is safely on disk."""


def make_tokenizer(directory: Path, recipe: Recipe) -> Tokenizer:
    """The tokenizer in `directory`; if there is none yet, that of the packaged model that the recipe names, or else a
    new one, is put there."""
    path = directory / "tokenizer.json"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        if (parent := recipe.tokenizer or recipe.teacher or recipe.start) is not None:
            shutil.copy(model_path(parent) / "tokenizer.json", path)
        else:
            texts = [] if recipe.shape.vocab == corpus.BYTES else list(corpus.split_texts("train").values())
            corpus.train_tokenizer(texts, recipe.shape.vocab).save(str(path))
    return Tokenizer.from_file(str(path))


def fitting(start: LlamaForCausalLM, model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of `start` that `model` has too, with rows for new tokens, which begin as the mean of the others, and
    those of `model` that `start` does not have."""
    wanted, weights = model.state_dict(), dict(start.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = weights[name]
        extra = table.mean(0, keepdim=True).expand(len(wanted[name]) - len(table), -1)
        weights[name] = torch.cat([table, extra])
    return {name: weights.get(name, own) for name, own in wanted.items()}


def save_pretrained(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path, dtype: torch.dtype) -> None:
    """Write model (in `dtype`) and tokenizer in Hugging Face format.

    A tokenizer with a mask token puts the end of text before every text, as the rows of these models begin with it.
    """
    copy: Any = type(model)(model.config)
    copy.to(dtype=dtype)
    copy.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in copy.state_dict()})
    copy.save_pretrained(directory)
    layers.save(model, directory)
    mask = {}
    if tokenizer.token_to_id(MASK) is not None:
        mask, tokenizer = {"mask_token": MASK}, Tokenizer.from_str(tokenizer.to_str())
        end = corpus.END_OF_TEXT
        tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
            single=f"{end} $A", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    fast = PreTrainedTokenizerFast(
        **mask,
        tokenizer_object=tokenizer,
        bos_token=corpus.END_OF_TEXT,
        eos_token=corpus.END_OF_TEXT,
        pad_token=corpus.END_OF_TEXT,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Factor on the peak rates: linear warm-up, flat, then linear decay to 2 % over the last `decay_fraction`, and once
    more from `unlikelihood_lr` to 2 % of that over the steps with unlikelihood."""
    plain = recipe.steps - recipe.unlikelihood_steps
    if step >= plain:
        return recipe.unlikelihood_lr * max((recipe.steps - step) / recipe.unlikelihood_steps, 0.02)
    left = (plain - step) / max(recipe.decay_fraction * plain, 1)
    return min((step + 1) / recipe.warmup, 1.0, max(left, 0.02))


class Run:
    """One training run: model, optimizers, data order and curve; saved and resumed as a whole."""

    def __init__(self, name: str, directory: Path, recipe: Recipe | None = None, compile_model: bool = True):
        self.name, self.directory = name, directory
        self.recipe = recipe or RECIPES[name]
        directory.mkdir(parents=True, exist_ok=True)
        place = "bytes" if self.recipe.shape.vocab == corpus.BYTES else "tokenizer"
        self.tokenizer = make_tokenizer(directory.parent / place, self.recipe)
        if self.recipe.objective in MASKED:
            self.tokenizer.add_special_tokens([MASK])
        torch.manual_seed(self.recipe.seed)
        end = self.tokenizer.encode(corpus.END_OF_TEXT).ids[0]
        self.model = layers.made(self.recipe.shape.config(end), self.recipe.layers)
        self.model.config._attn_implementation = "sdpa"
        objective = OBJECTIVES[self.recipe.objective]
        self.objective: Objective = objective(self.recipe, self.model, self.tokenizer, compile_model)
        if self.recipe.start is not None:
            self.model.load_state_dict(fitting(self._load(self.recipe.start), self.model))
        if self.recipe.teacher is not None:
            teacher: Any = self._load(self.recipe.teacher)
            self.objective.teacher = teacher.to(dtype=torch.bfloat16).eval()
        self.optimizers = self._optimizers()
        self.step, self.curve, self.seconds, self.running = 0, [], 0.0, math.nan

    def _load(self, name: str) -> LlamaForCausalLM:
        """A zoo model: the one trained beside this run, or else the packaged one."""
        own = self.directory.parent / name / "model"
        return LlamaForCausalLM.from_pretrained(own if own.exists() else model_path(name), dtype=torch.float32)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        ids = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in ids]
        muon = torch.optim.Muon(
            matrices, lr=self.recipe.lr, weight_decay=self.recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adam = torch.optim.AdamW(others, lr=self.recipe.embedding_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        return [muon, adam]

    def batches(self) -> Iterator[np.ndarray]:
        """Batches of the objective's rows from the current step on; the order depends on seed and step only."""
        size, step = self.recipe.batch, self.step
        per_epoch = self.objective.count // size
        while True:
            epoch, inside = divmod(step, per_epoch)
            rows = self.objective.rows(epoch)
            for index in range(inside, per_epoch):
                yield rows[index * size : (index + 1) * size]
                step += 1

    def save(self) -> None:
        """Write weights, optimizer tensors, step and curve, so that an interrupted write loses nothing."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        for i, optimizer in enumerate(self.optimizers):
            for j, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{i}/{j}/{k}": v for k, v in state.items() if torch.is_tensor(v)}
        half = self.directory / "state.tmp"
        about = {"name": self.name, "recipe": asdict(self.recipe), "step": self.step, "seconds": self.seconds}
        text = json.dumps(about | {"running": self.running, "curve": self.curve}, indent=1)
        header = {
            "step": str(self.step),
            "state": text,
        }  # one file holds all that belongs together; the JSON is to be read
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, half, header)
        half.replace(self.directory / "state.safetensors")
        (self.directory / "state.json").write_text(text)
        self._snapshot({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})

    def _snapshot(self, weights: dict[str, torch.Tensor]) -> None:
        """Keep the weights before the unlikelihood stage, and the mean of those saved in its second half."""
        stage = self.recipe.unlikelihood_steps
        start = self.recipe.steps - stage
        regular = self.step % self.recipe.save_every == 0 or self.step in (start, self.recipe.steps)
        if not stage or self.step < start or not regular:
            return
        if self.step == start:
            save_file({k: v.clone() for k, v in weights.items()}, self.directory / "before.safetensors")
        elif self.step > start + stage // 2:
            path = self.directory / "late.safetensors"
            late = load_file(path) if path.exists() else {"count": torch.zeros(())}
            late = {k: late.get(k, 0.0) + v for k, v in weights.items()} | {"count": late["count"] + 1}
            save_file(late, path)

    def resume(self) -> bool:
        """Go on from the saved state if there is one for this recipe; True if it did."""
        path = self.directory / "state.safetensors"
        if not path.exists():
            return False
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["state"])
        saved, current = completed(about["recipe"]), json.loads(json.dumps(asdict(self.recipe)))
        if saved | {"steps": 0} != current | {"steps": 0}:
            changed = sorted(k for k in current if saved.get(k) != current[k])
            raise ValueError(
                f"{self.directory} holds a run with another recipe (differs in {', '.join(changed)}); "
                "give another directory with --out, or delete this one"
            )
        tensors = load_file(path)
        weights = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
        self.model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
        for i, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            state["state"] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer/{i}/"):
                    _, _, index, field = key.split("/")
                    state["state"].setdefault(int(index), {})[field] = value
            optimizer.load_state_dict(state)
        self.step, self.curve, self.seconds = about["step"], about["curve"], about["seconds"]
        self.running = about["running"]
        return True

    def train(self, console: Console | None = None, until: int | None = None) -> None:
        """Train to the recipe's last step, or to step `until`; on Ctrl-C save and raise `RunInterrupted`."""
        recipe = self.recipe
        end = min(until or recipe.steps, recipe.steps)
        keep_freed_memory()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        started = time.perf_counter() - self.seconds
        whole = True  # False while only some of the weights have made the step
        with (
            Progress(*columns, console=console or Console(stderr=True)) as progress,
            layers.at_work(self.model, recipe.layers, recipe.keys),
        ):
            task = progress.add_task(self.name, total=end, completed=self.step)
            batches = self.batches()
            try:
                while self.step < end:
                    generator = torch.Generator().manual_seed(recipe.seed + self.step)
                    for optimizer, peak in zip(self.optimizers, (recipe.lr, recipe.embedding_lr), strict=True):
                        optimizer.param_groups[0]["lr"] = peak * learning_rate(self.step, recipe)
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        loss, plain = self.objective.loss(next(batches), self.step, generator)
                    loss.backward()
                    nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                    whole = False
                    for optimizer in self.optimizers:
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    self.step += 1
                    whole = True
                    self.seconds = time.perf_counter() - started
                    self.running = plain if math.isnan(self.running) else 0.98 * self.running + 0.02 * plain
                    progress.update(task, advance=1, description=f"{self.name} loss {self.running:.3f}")
                    if self.step % recipe.evaluate_every == 0 or self.step == end:
                        point = {"step": self.step, "train": self.running, "seconds": round(self.seconds, 1)}
                        self.curve.append(point | self.objective.evaluate())
                        progress.console.print(json.dumps(self.curve[-1]))
                    if self.step % recipe.save_every == 0 or self.step == end:
                        self.save()
            except KeyboardInterrupt:
                if whole:
                    self.save()
                place = f"at step {self.step}" if whole else f"within step {self.step + 1}"
                raise RunInterrupted(
                    f"stopped {place} of {end}; run again to go on from the last whole state"
                ) from None

    def export(self) -> Path:
        """Write the trained model in bf16 Hugging Face format; returns its directory."""
        path = self.directory / "model"
        before, late = self.directory / "before.safetensors", self.directory / "late.safetensors"
        if before.exists() and late.exists():
            start, total, own = load_file(before), load_file(late), self.model.state_dict()
            count = total.pop("count")
            for name, weight in start.items():
                own[name].copy_(weight + self.recipe.extrapolate * (total[name] / count - weight))
        save_pretrained(self.model, self.tokenizer, path, torch.bfloat16)
        return path
