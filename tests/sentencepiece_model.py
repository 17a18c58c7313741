"""A byte-fallback sentencepiece model as Llama's, trained on the spot from a few sentences."""

import io
from functools import cache

import sentencepiece

from dataset.text import CONV


@cache
def train_sentencepiece(sentences: tuple[str, ...], size: int) -> bytes:
    """Bytes of a BPE model with `size` pieces; it has seen the conversation templates besides `sentences`."""
    model = io.BytesIO()
    texts = [*sentences, *(form.opening + form.ask for form in CONV.values())]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 50),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
