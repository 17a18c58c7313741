"""The recipe of the small tokenizer shipped with the tiny preset: a Llama-like sentencepiece model."""

import json
from pathlib import Path

import numpy as np
import sentencepiece

from dataset.synthetic import COLOURS, KINDS, PURPOSES, draw_scene
from dataset.synthetic_qa import ask_and_answer
from dataset.text import CONV

_EXTRA = (
    "Please segment {}.",
    "Segment {} in this image.",
    "Can you outline {}?",
    "Mark {}, please.",
    "Show me {}.",
    "Sure, it is here.",
    "It is in the image.",
    "There is no {} in this image.",
    "building land road vegetation water area region class picture satellite aerial scene view",
    "Is any {} in view? Segment it, or say that none is visible.",
)


def corpus(scenes: int = 1500, seed: int = 0) -> list[str]:
    """Sentences the tokenizer is trained on: conversation forms, scene questions, class words."""
    rng = np.random.default_rng(seed)
    lines = [form.opening + form.ask for form in CONV.values() if form.opening] * 400
    for _ in range(scenes):
        lines += [f"{q} ASSISTANT: {a}" for q, a in ask_and_answer(draw_scene(rng, 64), rng, 8)]
    nouns = [*KINDS, *(k + "s" for k in KINDS), *(f"{c} object" for c in COLOURS), "objects"]
    lines += [text.format(f"the {noun}") for text in _EXTRA for noun in nouns for _ in range(12)]
    return lines + [q for questions in PURPOSES.values() for q in questions for _ in range(60)]


def train_tokenizer(folder: Path, vocab_size: int = 896) -> None:
    """Write `tokenizer.model` (BPE with byte fallback) and `tokenizer_config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        user_defined_symbols=list(".,?:;!"),  # punctuation never merges with the word before it
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
