"""Shared by the checkpoint tests: comparing models, a base without masks, pickles of old programs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dataset.text import Tokenizer
from model.checkpoint import save_base, save_sam
from model.lisat import Lisat
from tests.tiny_lisat import tiny_model, tiny_processor, tiny_tokenizer

State = dict[str, Tensor]


def equal(a: nn.Module | State, b: nn.Module | State) -> bool:
    """Same names, dtypes and bits."""
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def base_tokenizer() -> Tokenizer:
    """The tiny tokenizer before LISAT's tokens are added."""
    return Tokenizer(tiny_tokenizer()._proto)


def base_model() -> Lisat:
    """A LISAT_PRE-like model: no masks, vocabulary without added tokens."""
    config = tiny_model().config
    llm = {**config.llm, "vocab_size": len(base_tokenizer())}
    torch.manual_seed(3)
    return Lisat(replace(config, llm=llm, sam=None, seg_token_id=-1)).eval()


def write_bases(folder: Path) -> tuple[Path, Path]:
    """Our two base files in `folder`: one without masks, and SAM."""
    base = save_base(base_model(), folder / "llava", tokenizer=base_tokenizer(), processor=tiny_processor())
    return base, save_sam(tiny_model().sam, folder / "sam.safetensors")


def as_pickles(folder: Path, parts: int, old_format: bool) -> None:
    """Turn a folder's safetensors into `.bin` shards with an index, or one file."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = list(state), {}
    for part in range(parts):
        file = f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin" if parts > 1 else "pytorch_model.bin"
        shard = {name: state[name] for name in names[part::parts]}
        new = not old_format or part % 2 == 1  # one folder may mix both formats
        torch.save(shard, folder / file, _use_new_zipfile_serialization=new)
        weight_map |= dict.fromkeys(shard, file)
    if parts > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def change(file: Path, edit: Callable[[State], State]) -> None:
    """Rewrite a safetensors file."""
    save_file(edit(load_file(file)), file)
