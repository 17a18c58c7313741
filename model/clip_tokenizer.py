"""CLIP's byte-pair tokenizer: words -> ids, equal to OpenCLIP's, on the `tokenizers` library.

The merges (1.4 MB) are no part of this project: they come from the installed `open_clip` package (read as a
file, never imported), from OpenAI's `bpe_simple_vocab_16e6.txt.gz`, or from any model's `merges.txt`.
"""

import gzip
import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.io import StrPath

VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
CONTEXT_LENGTH = 77
N_MERGES = 49152 - 256 - 2
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def find_vocabulary(path: StrPath | None = None) -> Path:
    """The file of merges: `path`, or the one of the installed open_clip package.

    Raises:
        ValueError: it is not there; says how to get it.
    """
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such vocabulary; give {VOCABULARY_FILE} or a model's merges.txt")
        return Path(path)
    package = importlib.util.find_spec("open_clip")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        file = Path(folder) / VOCABULARY_FILE
        if file.is_file():
            return file
    raise ValueError(
        f"CLIP's vocabulary {VOCABULARY_FILE} was not found: `pip install open-clip-torch`, or name the file"
    )


class ClipTokenizer:
    """Texts -> ids int64 (B, 77): start, pieces, end, zeros. Longer texts are cut, the end stays.

    Args:
        vocabulary: file of merges (plain or gzip); None: the open_clip package's.
        context_length: ids per text.
    """

    def __init__(self, vocabulary: StrPath | None = None, context_length: int = CONTEXT_LENGTH) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        merges = _read_merges(find_vocabulary(vocabulary))
        letters = _byte_letters()
        pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
        model = models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=merges,
            end_of_word_suffix="</w>",
        )
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self.context_length = context_length
        self.start_id, self.end_id = len(pieces), len(pieces) + 1

    @property
    def vocab_size(self) -> int:
        """Number of ids, start and end included (49408)."""
        return self.end_id + 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids int64 (B, context length) of B texts."""
        ids = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(ids, texts):
            pieces = self._tokenizer.encode(clean_text(text)).ids[: self.context_length - 2]
            row[: len(pieces) + 2] = torch.tensor([self.start_id, *pieces, self.end_id])
        return ids


def clean_text(text: str) -> str:
    """CLIP's cleaning: broken encodings mended, HTML entities resolved, white space single, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _read_merges(path: Path) -> list[tuple[str, str]]:
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    lines = data.decode("utf-8").split("\n")[1 : N_MERGES + 1]  # the first line is a heading
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != N_MERGES or any(len(pair) != 2 for pair in merges):
        raise ValueError(
            f"{path}: expected a heading and {N_MERGES} lines of two pieces; give CLIP's {VOCABULARY_FILE}"
        )
    return merges


def _byte_letters() -> list[str]:
    """The 256 symbols that stand for bytes in CLIP's vocabulary, in its order: bytes that are printable
    characters stand for themselves and come first; the others follow as U+0100, U+0101, ..."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + k) for k in range(256 - len(printable))]
