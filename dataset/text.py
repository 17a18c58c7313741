"""Text -> token ids -> labels, exactly as the published checkpoints were trained.

`Tokenizer` reproduces the old slow Llama tokenizer (transformers 4.31, legacy mode) on top of sentencepiece;
`build_prompt` and `encode_prompt` turn the turns of a conversation into the wire format, ids and labels.
Lengths and offsets inside this file count UTF-8 bytes of the prompt.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

from utils.io import StrPath, atomic_write_bytes, atomic_write_text, read_json

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""
IMAGE_TOKEN_INDEX = -200
"""Id that stands for all patch features of the image."""
IMAGE_TOKEN = "<image>"
SEG_TOKEN = "[SEG]"
IM_START, IM_END = "<im_start>", "<im_end>"

Turns = list[tuple[str, str | None]]
"""(user text, assistant text) pairs without image tags; None or "" leaves the last answer open."""


# ---------------------------------------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class _Piece:
    """One token id and the bytes [begin, end) of the text it stands for (none for a lone word start)."""

    id: int
    begin: int
    end: int


class Tokenizer:
    """Sentencepiece with added tokens, id for id the slow Llama tokenizer of transformers 4.31.

    Rules (specs of the checkpoints): the text is cut at added tokens and at `<s>`, `</s>`, `<unk>`; white
    space next to an added token is dropped on both sides; every remaining chunk is encoded on its own, so it
    gets its own word-start mark. Padding uses the id of `<unk>`.

    Args:
        model_proto: bytes of a sentencepiece `tokenizer.model`.
        added: added tokens -> ids; ids start at the vocabulary size of the sentencepiece model.
        legacy: the tokenizer config's `legacy` flag (False: no word-start mark after a special token).
        model_max_length: longest row in tokens, image features included; None means no limit.
        config: further entries for `tokenizer_config.json`, kept for saving.
    """

    def __init__(
        self,
        model_proto: bytes,
        added: dict[str, int] | None = None,
        legacy: bool = True,
        model_max_length: int | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._proto = model_proto
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        self.legacy = legacy
        self.model_max_length = model_max_length
        self._config = dict(config or {})
        self.unk_token_id, self.bos_token_id, self.eos_token_id = (
            self._sp.unk_id(),
            self._sp.bos_id(),
            self._sp.eos_id(),
        )
        if min(self.unk_token_id, self.bos_token_id, self.eos_token_id) < 0:
            raise ValueError(
                "tokenizer.model defines no <unk>, <s> or </s>; train it with bos_id, eos_id and unk_id >= 0"
            )
        self.pad_token_id = self.unk_token_id
        self._specials = {
            self._sp.id_to_piece(i): i for i in (self.unk_token_id, self.bos_token_id, self.eos_token_id)
        }
        self.added: dict[str, int] = {}
        for token, index in sorted((added or {}).items(), key=lambda item: item[1]):
            self._register(token, index)

    # ---- files

    @classmethod
    def from_pretrained(cls, folder: StrPath, model_max_length: int | None = None) -> "Tokenizer":
        """Read `tokenizer.model`, and `added_tokens.json`, `tokenizer_config.json` where they exist.

        Args:
            folder: a checkpoint folder.
            model_max_length: replaces the folder's value.
        Raises:
            ValueError: no sentencepiece model in the folder, or a broken one.
        """
        folder = Path(folder)
        model = folder / "tokenizer.model"
        if not model.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.model; a sentencepiece model is needed (a tokenizer.json alone "
                "gives other ids): copy tokenizer.model of the base checkpoint there"
            )
        config = (
            read_json(folder / "tokenizer_config.json")
            if (folder / "tokenizer_config.json").is_file()
            else {}
        )
        added = {
            entry["content"]: int(index)
            for index, entry in (config.pop("added_tokens_decoder", None) or {}).items()
        }
        if (folder / "added_tokens.json").is_file():
            added |= read_json(folder / "added_tokens.json")
        length = model_max_length or config.get("model_max_length")
        try:
            return cls(
                model.read_bytes(),
                added,
                legacy=config.get("legacy") is not False,
                model_max_length=int(length) if length and length < 1e9 else None,
                config=config,
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{model}: not a sentencepiece model ({error})") from error

    def save_pretrained(self, folder: StrPath) -> None:
        """Write the four files of the published export; `from_pretrained` gives an equal tokenizer."""
        folder = Path(folder)
        atomic_write_bytes(folder / "tokenizer.model", self._proto)
        config = {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": _token_entry(self._sp.id_to_piece(self.bos_token_id)),
            "clean_up_tokenization_spaces": False,
            "eos_token": _token_entry(self._sp.id_to_piece(self.eos_token_id)),
            "pad_token": None,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": _token_entry(self._sp.id_to_piece(self.unk_token_id)),
        }
        config |= self._config | {"legacy": self.legacy}
        config["model_max_length"] = self.model_max_length or int(1e30)
        names = ("bos_token", "eos_token", "unk_token")
        special = {
            name: {k: v for k, v in config[name].items() if k != "__type"}
            if isinstance(config[name], dict)
            else config[name]
            for name in names
        }
        special["pad_token"] = self._sp.id_to_piece(self.pad_token_id)
        _write_sorted(folder / "tokenizer_config.json", config)
        _write_sorted(folder / "special_tokens_map.json", special)
        if self.added:
            _write_sorted(folder / "added_tokens.json", self.added)
        else:
            (folder / "added_tokens.json").unlink(missing_ok=True)

    # ---- vocabulary

    def __len__(self) -> int:
        """Rows the embedding matrix needs: highest id + 1."""
        return max([self._sp.get_piece_size() - 1, *self.added.values()]) + 1

    def add_tokens(self, tokens: list[str]) -> int:
        """Append tokens that are not in the vocabulary yet; returns how many were new."""
        new = [token for token in dict.fromkeys(tokens) if token and not self.has_token(token)]
        for token in new:
            self._register(token, len(self))
        return len(new)

    def has_token(self, token: str) -> bool:
        """Whether `token` has an id of its own."""
        return token in self.added or token in self._specials or self._known_piece(token)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """Id of a token (or of each of a list); the id of `<unk>` for unknown ones."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        return self.added[tokens] if tokens in self.added else self._sp.piece_to_id(tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Piece or added token of each id."""
        names = {index: token for token, index in self.added.items()}
        return [names[i] if i in names else self._sp.id_to_piece(i) for i in ids]

    def token_id(self, token: str) -> int:
        """Id of a token that must exist (ValueError otherwise)."""
        if not self.has_token(token):
            raise ValueError(f"the tokenizer has no token {token!r}; call add_tokens([{token!r}]) first")
        return self.convert_tokens_to_ids(token)

    @property
    def seg_token_id(self) -> int:
        """Id of `[SEG]`; ValueError where it was not added."""
        return self.token_id(SEG_TOKEN)

    @property
    def im_start_id(self) -> int:
        """Id of `<im_start>`; ValueError where it was not added."""
        return self.token_id(IM_START)

    @property
    def im_end_id(self) -> int:
        """Id of `<im_end>`; ValueError where it was not added."""
        return self.token_id(IM_END)

    def _known_piece(self, token: str) -> bool:
        return self._sp.piece_to_id(token) != self.unk_token_id

    def _register(self, token: str, index: int) -> None:
        if token in self._specials or (index < self._sp.get_piece_size() and self._known_piece(token)):
            return  # a base piece that some exports list again
        if index < self._sp.get_piece_size() or index in self.added.values():
            raise ValueError(
                f"added token {token!r} has id {index}, which is taken; the sentencepiece model holds ids "
                f"0..{self._sp.get_piece_size() - 1}: this tokenizer.model belongs to another checkpoint"
            )
        self.added[token] = index
        self.__dict__.pop("_cutter", None)

    @cached_property
    def _cutter(self) -> re.Pattern[str]:
        tokens = sorted([*self.added, *self._specials], key=len, reverse=True)
        return re.compile("(" + "|".join(re.escape(token) for token in tokens) + ")")

    # ---- text -> ids

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text without image placeholder; `bos` puts id of `<s>` in front."""
        return [self.bos_token_id] * bos + [piece.id for piece in self._pieces(self.normalise(text))]

    def encode_with_image(self, text: str) -> list[int]:
        """Ids of a ready prompt in which every `<image>` becomes -200; starts with `<s>`."""
        return [self.bos_token_id] + [piece.id for piece in self._image_pieces(self.normalise(text))]

    def normalise(self, text: str) -> str:
        """Text as sentencepiece gets it (unchanged in legacy mode)."""
        return text if self.legacy else text.replace("\u2581", " ")

    def _image_pieces(self, text: str) -> list[_Piece]:
        pieces: list[_Piece] = []
        offset = 0
        for number, part in enumerate(text.split(IMAGE_TOKEN)):
            if number:
                end = offset + len(IMAGE_TOKEN)
                pieces.append(_Piece(IMAGE_TOKEN_INDEX, offset, end))
                offset = end
            pieces += self._pieces(part, offset)
            offset += len(part.encode())
        return pieces

    def _pieces(self, text: str, offset: int = 0) -> list[_Piece]:
        pieces: list[_Piece] = []
        parts = self._cutter.split(text)  # chunks at even, special tokens at odd places
        for number, part in enumerate(parts):
            size = len(part.encode())
            if number % 2:
                index = self.added[part] if part in self.added else self._specials[part]
                pieces.append(_Piece(index, offset, offset + size))
            else:
                chunk = part
                if number + 1 < len(parts) and parts[number + 1] in self.added:
                    chunk = chunk.rstrip()
                start = offset
                if number and parts[number - 1] in self.added:
                    start += len(chunk.encode()) - len(chunk.lstrip().encode())
                    chunk = chunk.lstrip()
                pieces += self._chunk(chunk, start, first=number == 0)
            offset += size
        return pieces

    def _chunk(self, chunk: str, offset: int, first: bool) -> list[_Piece]:
        if not chunk:
            return []
        proto = self._sp.encode(chunk, return_type="proto")
        pieces = [_Piece(piece.id, offset + piece.begin, offset + piece.end) for piece in proto.pieces]
        if not self.legacy and not first and not chunk.startswith(" "):
            head = proto.pieces[0].piece
            if head == "\u2581":
                pieces = pieces[1:]
            elif head.startswith("\u2581"):
                pieces[0] = _Piece(self._sp.piece_to_id(head[1:]), pieces[0].begin, pieces[0].end)
        return pieces

    # ---- ids -> text

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ids, string for string the old slow decoder: added tokens stand between single spaces.

        Image placeholders (-200) are left out; `[SEG]` is an ordinary added token and always stays.
        """
        names = {index: token for token, index in self.added.items()}
        specials = set(self._specials.values())
        parts: list[str] = []
        run: list[int] = []
        for index in (int(i) for i in ids):
            if index == IMAGE_TOKEN_INDEX or (skip_special_tokens and index in specials):
                continue
            if index in names:
                if run:
                    parts.append(self._decode_run(run, specials))
                    run = []
                parts.append(names[index])
            elif 0 <= index < self._sp.get_piece_size():
                run.append(index)
            else:
                raise ValueError(f"id {index} is outside the vocabulary of {len(self)} tokens")
        if run:
            parts.append(self._decode_run(run, specials))
        return " ".join(parts)

    def _decode_run(self, run: list[int], specials: set[int]) -> str:
        """Text between added tokens; the first special after ordinary pieces has a space before them."""
        text, words = "", []
        for place, index in enumerate(run):
            if index not in specials:
                words.append(index)
                continue
            if place and run[place - 1] not in specials:
                text += " "
            text += (self._sp.decode(words) if words else "") + self._sp.id_to_piece(index)
            words = []
        return text + (self._sp.decode(words) if words else "")


def _token_entry(content: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


def _write_sorted(path: Path, value: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Template:
    """Wire format of a conversation: opening q1 ask lead a1 close between q2 ask lead a2 close ...

    Loss falls on `lead + answer + close`. An open prompt ends behind `ask`.
    """

    opening: str
    between: str
    ask: str
    lead: str
    close: str
    image: str = IMAGE_TOKEN + "\n"


def _vicuna(person: str) -> Template:
    system = (
        f"A chat between a curious {person} and an artificial intelligence assistant. The assistant gives "
        f"helpful, detailed, and polite answers to the {person}'s questions."
    )
    return Template(f"{system} USER: ", "USER: ", " ASSISTANT:", " ", "</s>")


_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)

CONV: dict[str, Template] = {
    "llava_v1": _vicuna("human"),
    "vicuna_v1": _vicuna("user"),
    "llava_llama_2": Template(
        f"[INST] <<SYS>>\n{_LLAMA_2_SYSTEM}\n<</SYS>>\n\n", "<s>[INST] ", " [/INST]", " ", " </s>"
    ),
    "plain": Template("", "", "", "", "\n", image=IMAGE_TOKEN),
}
"""Conversation templates by name. `llava_v1` trains; the published evaluation scripts run `vicuna_v1`."""


def _segments(conv_type: str, turns: Turns, has_image: bool, im_start_end: bool) -> list[tuple[str, bool]]:
    """Parts of the prompt as (text, carries loss)."""
    if conv_type not in CONV:
        raise ValueError(f"conv_type {conv_type!r} is unknown; choose one of {', '.join(CONV)}")
    if not turns:
        raise ValueError("a conversation needs at least one turn (user text, assistant text)")
    template = CONV[conv_type]
    image = template.image
    if im_start_end:
        image = image.replace(IMAGE_TOKEN, IM_START + IMAGE_TOKEN + IM_END)
    segments: list[tuple[str, bool]] = []
    for number, (user, answer) in enumerate(turns):
        if IMAGE_TOKEN in user or IMAGE_TOKEN in (answer or ""):
            raise ValueError(
                f"turn {number} contains {IMAGE_TOKEN!r} ({user[:80]!r}); leave it out, it is put in "
                "front of the first turn where has_image is true"
            )
        tag = image if has_image and number == 0 else ""
        head = template.between if number else template.opening
        segments.append((head + tag + user + template.ask, False))
        if answer:
            segments.append((template.lead + answer + template.close, True))
        elif number + 1 < len(turns):
            raise ValueError(
                f"turn {number} has no answer but is not the last one: only the last may be open"
            )
    return segments


def build_prompt(conv_type: str, turns: Turns, has_image: bool = True, im_start_end: bool = True) -> str:
    """Prompt string of a conversation.

    Args:
        conv_type: a name in `CONV`.
        turns: (user, assistant) texts; None or "" as the last answer leaves the prompt open.
        has_image: put the image tag and a newline in front of the first user text.
        im_start_end: write the tag as `<im_start><image><im_end>` instead of `<image>`.
    """
    return "".join(text for text, _ in _segments(conv_type, turns, has_image, im_start_end))


def encode_prompt(
    tokenizer: Tokenizer,
    conv_type: str,
    turns: Turns,
    has_image: bool = True,
    im_start_end: bool = True,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation (arguments as `build_prompt`).

    Returns:
        ids: starts with `<s>`; -200 stands for the image.
        labels: equal to the ids on the tokens of every answer and its closing `</s>`, -100 elsewhere. They
            come from the byte spans of the answers, so text that looks like a separator does no harm.
    """
    text, spans = "", []
    size = 0
    for part, answer in _segments(conv_type, turns, has_image, im_start_end):
        part = tokenizer.normalise(part)
        end = size + len(part.encode())
        if answer:
            spans.append((size, end))
        text, size = text + part, end
    ids, labels = [tokenizer.bos_token_id], [IGNORE_INDEX]
    open_spans = iter(spans)
    span = next(open_spans, None)
    for piece in tokenizer._image_pieces(text):
        while span and piece.begin >= span[1]:
            span = next(open_spans, None)
        inside = span is not None and (piece.end > span[0] or piece.begin >= span[0])
        ids.append(piece.id)
        labels.append(piece.id if inside else IGNORE_INDEX)
    return ids, labels
