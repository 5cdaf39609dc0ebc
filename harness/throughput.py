"""How fast samples are generated: dylo_moe beside EvalPlus's own backend "hf", same model, same tasks, as ratios in one run.

    python -m harness.throughput [--tasks 164] [--tokens 64] [--pairs 3] [--json FILE]

Times are end to end, from a directory on disk to the sample file: loading, generating, sanitizing, writing. The two sides take
turns, so that a ratio compares neighbours in time. The model is made on the fly with random weights; it can write no stop string
and no end of text, so every completion has the same number of tokens, except where hf stops too early by itself (stop criteria
of earlier prompts stay on its model): that makes hf faster, and is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.machine import describe_machine, versions
from harness.specimens import write_checkpoint
from harness.specimens.tasks import write_task_set

OVERRIDE = "HUMANEVAL_OVERRIDE_PATH"
SPECIALS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
VOCABULARY = 4096


@dataclass(frozen=True)
class Size:
    """Of the model on the fly."""

    hidden: int
    layers: int


def write_model(directory: Path, texts: Sequence[str], size: Size, seed: int = 0) -> Path:
    """A random Llama with a tokenizer trained on `texts`. It never writes a newline, "<" or an end token, so it never stops."""
    tokenizer = _tokenizer(texts)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.hidden // 32),
        num_key_value_heads=max(1, size.hidden // 64),
        max_position_embeddings=4096,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        **{name + "_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIALS.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    stopping = [i for i in range(len(tokenizer)) if any(c in tokenizer.decode([i]) for c in "\n<")]
    model.generation_config.suppress_tokens = sorted({*stopping, *tokenizer.all_special_ids})
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = list(SPECIALS.values())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, padding_side="left", **SPECIALS)


@dataclass(frozen=True)
class Work:
    """What both sides do."""

    model: Path
    routed: Path
    tasks: int
    tokens: int
    bs: int | None
    attention: str

    @property
    def id_range(self) -> list[int]:
        return [0, self.tasks]


def run_hf(work: Work, root: Path) -> Path:
    """EvalPlus's provider "hf" under EvalPlus's codegen, greedy."""
    from evalplus.codegen import codegen
    from evalplus.provider import make_model
    from evalplus.provider.utility import EOS

    before = list(EOS)
    options = {"dtype": "float32", "temperature": 0.0, "attn_implementation": work.attention}
    decoder = make_model(model=str(work.model), backend="hf", dataset="humaneval", **options)
    decoder.max_new_tokens = work.tokens
    codegen(str(root / "hf.jsonl"), decoder, "humaneval", greedy=True, id_range=work.id_range)
    EOS[:] = before  # its decoder has added to the list of the whole process; the next one would search twice as much
    return root / "hf.raw.jsonl"


def run_ours(work: Work, root: Path, strategy: str | None = None) -> Path:
    """Ours on the same model, or by a strategy on the checkpoint with experts on it."""
    from dylo_moe.evalplus import run_codegen

    model = work.model if strategy is None else work.routed
    options = {"backend": "peft_moe", "dtype": "float32", "greedy": True, "id_range": work.id_range, "bs": work.bs}
    options |= {"max_new_tokens": work.tokens, "attn_implementation": work.attention, "routing_strategy": strategy or "router"}
    path = Path(run_codegen(str(model), "humaneval", root=str(root), **options))
    return path.with_name(path.name.replace(".jsonl", ".raw.jsonl"))


def measure(work: Work, pairs: int, strategies: Sequence[str]) -> dict[str, object]:
    """Seconds of hf and of each of ours, in turns, and what they wrote. The first round warms up and is not counted."""
    sides: dict[str, Callable[[Work, Path], Path]] = {"hf": run_hf, "plain": run_ours}
    for strategy in strategies:
        sides[strategy] = lambda work, root, strategy=strategy: run_ours(work, root, strategy)
    warm = Work(**{**vars(work), "tasks": 2, "tokens": 4})
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    texts: dict[str, dict[str, str]] = {}
    for number in range(-1, pairs):
        for name, run in sides.items():
            with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
                begin, busy = time.perf_counter(), _processor_seconds()
                written = run(warm if number < 0 else work, Path(root))
                elapsed = time.perf_counter() - begin
                texts[name] = _texts(written)
            if number >= 0:
                seconds[name].append(elapsed)
                processor[name].append(_processor_seconds() - busy)
                print(f"round {number + 1}: {name} {elapsed:.2f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    measured = {"seconds": seconds, "ratios": _ratios(seconds), "processor": processor, "processor_ratios": _ratios(processor)}
    return {**measured, **_agreement(texts["hf"], texts["plain"])}


def _processor_seconds() -> float:
    """Of this process and the children that have ended; hardly touched by what else the machine does."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _texts(path: Path) -> dict[str, str]:
    return {row["task_id"]: row["solution"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def _ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """hf's seconds over ours, round by round."""
    found = {}
    for name, ours in seconds.items():
        if name != "hf":
            ratios = [theirs / own for theirs, own in zip(seconds["hf"], ours, strict=True)]
            found[name] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return found


def _agreement(theirs: dict[str, str], ours: dict[str, str]) -> dict[str, int]:
    """On how many tasks hf wrote our text, stopped before its end, or wrote another."""
    same = sum(ours[task] == text for task, text in theirs.items())
    short = sum(ours[task] != text and ours[task].startswith(text) for task, text in theirs.items())
    return {"same_text": same, "hf_stopped_early": short, "other_text": len(theirs) - same - short}


def report(found: dict[str, object], work: Work) -> str:
    per_token = {name: min(values) / (work.tasks * work.tokens) for name, values in found["seconds"].items()}
    lines = [f"{'':<12} {'fastest':>9} {'tokens/s':>9}   hf / ours, median (lowest to highest); in processor time"]
    for name, values in found["seconds"].items():
        ratio = found["ratios"].get(name)
        told = "" if ratio is None else f"   {ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}); "
        told += "" if ratio is None else f"{found['processor_ratios'][name]['median']:.2f}"
        lines.append(f"{name:<12} {min(values):>7.2f} s {1 / per_token[name]:>9.0f}{told}")
    lines.append(
        f"{work.tasks} tasks, {work.tokens} new tokens each, greedy, float32, {work.attention} attention; "
        f"hf wrote our text for {found['same_text']}, stopped early in {found['hf_stopped_early']}, another text in "
        f"{found['other_text']}"
    )
    machine = found["machine"]
    lines.append(f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, load {machine['load']:.1f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.throughput", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=164, help=f"of the file that {OVERRIDE} names, else of 18 of our own")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each task")
    parser.add_argument("--pairs", type=int, default=3, help="rounds")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--bs", type=int, help="rows of a batch of ours")
    parser.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
    parser.add_argument("--strategies", nargs="*", default=["router"], help="also measured, on a checkpoint with four experts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        if OVERRIDE not in os.environ:  # before EvalPlus is imported, which reads it once
            os.environ[OVERRIDE] = str(write_task_set(place / "tasks", "humaneval"))
        from evalplus.data import get_human_eval_plus

        prompts = [task["prompt"] for task in get_human_eval_plus().values()]
        model = write_model(place / "model", prompts, Size(given.hidden, given.layers))
        routed = write_checkpoint(place / "routed", model, num_experts=4, targets="all-linear")
        work = Work(model, routed, min(given.tasks, len(prompts)), given.tokens, given.bs, given.attention)
        found = measure(work, given.pairs, given.strategies)
    machine = {**describe_machine("cuda" if torch.cuda.is_available() else "cpu"), "threads": torch.get_num_threads()}
    found |= {"machine": {**machine, "load": os.getloadavg()[0]}, "versions": versions()}
    print(report(found, work))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
