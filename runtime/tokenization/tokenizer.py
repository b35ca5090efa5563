"""Text to token ids and back, from a model directory's `tokenizer.json`; no code and no template from there is run.

User text can never be tokenised into special tokens: it goes through a second tokenizer without added tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from ..checkpoint.file_kinds import describe_file
from .byte_level import byte_alphabet
from .tiktoken_file import VOCABULARY_FILE, read_tiktoken

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
TOOL_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
TOOL_CALLS_END = "<｜tool▁calls▁end｜>"
TOOL_CALL_BEGIN = "<｜tool▁call▁begin｜>"
TOOL_CALL_END = "<｜tool▁call▁end｜>"
TOOL_OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
TOOL_OUTPUTS_END = "<｜tool▁outputs▁end｜>"
TOOL_OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
TOOL_OUTPUT_END = "<｜tool▁output▁end｜>"
TOOL_SEP = "<｜tool▁sep｜>"


@dataclass(frozen=True, slots=True)
class Special:
    """An added token in a rendered prompt. Plain strings beside it are text, whatever they spell."""

    text: str


Part = str | Special


class Tokenizer:
    """A byte-level BPE or a word-level tokenizer (`tokenizers` library); immutable, so threads may share it."""

    def __init__(
        self, spec: dict[str, Any], eos_token_ids: Sequence[int] = (), settings: Mapping[str, Any] | None = None
    ) -> None:
        """`spec` is the content of tokenizer.json, `settings` that of tokenizer_config.json.

        ValueError for other kinds of tokenizer, and for a begin- or end-of-sequence token that `spec` lacks.
        """
        model, decoder = (spec.get("model") or {}).get("type"), spec.get("decoder")
        if model not in ("BPE", "WordLevel") or (decoder and decoder["type"] != "ByteLevel"):
            raise ValueError(
                f"tokenizer.json has model {model} and decoder {decoder and decoder['type']}; supported are BPE and "
                "WordLevel with a ByteLevel decoder or none"
            )
        self._full = tokenizers.Tokenizer.from_str(json.dumps(spec))
        ids = self._full.get_vocab(with_added_tokens=True)
        text_spec = _without_added_tokens(spec) | {"post_processor": _post_processor(spec, settings or {}, ids)}
        self._text = tokenizers.Tokenizer.from_str(json.dumps(text_spec))
        added = spec.get("added_tokens") or []
        self._added_ids = {t["content"]: ids[t["content"]] for t in added}
        self._added_texts = {i: t for t, i in self._added_ids.items()}
        self.skipped_token_ids = frozenset(self._added_ids[t["content"]] for t in added if t["special"])
        """Added tokens that `decode` leaves out with `skip_special_tokens`."""
        self._skipped_beside: dict[frozenset[str], frozenset[int]] = {}
        self._known_bytes: dict[int, bytes | None] = {}
        """What `token_bytes` has found, at most one entry per token of the vocabulary."""
        self._byte_of_char = {c: b for b, c in enumerate(byte_alphabet())} if decoder else None
        self._added_token = re.compile(
            "|".join(map(re.escape, sorted(self._added_ids, key=len, reverse=True))) or r"(?!)"
        )
        self.vocab_size = 1 + max(ids.values())
        """One more than the largest id; a model may have more rows."""
        eos = _sentence_token(settings or {}, "eos_token", ids)
        self.eos_token_ids: tuple[int, ...] = tuple(sorted({*eos_token_ids, *(() if eos is None else (eos[1],))}))
        """Ids that end an answer."""
        self.separator: bytes = b"" if decoder else b" "
        """Bytes that `decode` puts between two tokens."""
        self.longest_token = _longest_token(text_spec) if decoder else None
        """Most bytes of a text that one token stands for; None where a token may stand for any number."""

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer | None:
        """Read the tokenizer of a model directory: its tokenizer.json, or Kimi's vocabulary; None if it has neither.

        Begin- and end-of-sequence tokens are those of transformers and vLLM: see `_post_processor` for what is added
        to a prompt; an answer ends at the `eos_token` of tokenizer_config.json (or special_tokens_map.json) and at the
        ids of `read_eos_token_ids`.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        settings = read_json(directory / "tokenizer_config.json") or {}
        spec = read_json(path)
        if spec is None:
            path = directory / VOCABULARY_FILE
            spec = read_tiktoken(directory, settings)
        if spec is None:
            return None
        if "added_tokens_decoder" not in settings:  # the older way to name special tokens
            settings |= read_json(directory / "special_tokens_map.json") or {}
        try:
            return cls(spec, read_eos_token_ids(directory), settings)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} cannot be used: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: `<｜User｜>` or `</think>` in it become ordinary tokens; no first token is added.

        The only added token that can come out is the unknown-word token of a word-level vocabulary. A lone surrogate is
        a ValueError.
        """
        _check_unicode(text)
        ids: list[int] = self._text.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Like `encode`, with the begin- and end-of-sequence tokens that the tokenizer adds to a prompt."""
        _check_unicode(text)
        ids: list[int] = self._text.encode(text, add_special_tokens=True).ids
        return ids

    def encode_rendered(self, parts: Sequence[Part]) -> list[int]:
        """Token ids of a rendered prompt, adjacent texts as one; a `Special` the tokenizer lacks is a ValueError."""
        ids: list[int] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            special = self.special_id(part.text)
            if special is None:
                raise ValueError(f"this tokenizer has no token {part.text}, which the prompt needs")
            if text:
                ids += self.encode(text)
                text = ""
            ids.append(special)
        return ids + self.encode(text) if text else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD; ids that have no token are left out.

        `skip_special_tokens` leaves out those marked special=true; DeepSeek's `<｜User｜>`, `</think>`, ... are not.
        """
        text: str = self._full.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes | None:
        """Bytes that one token adds to the text, or None for nothing.

        `decode(ids)` is the UTF-8 of these joined by `separator`, with U+FFFD for what is no UTF-8.
        """
        if skip_special_tokens and token_id in self.skipped_token_ids:
            return None
        if token_id not in self._known_bytes:
            self._known_bytes[token_id] = self._find_bytes(token_id)
        return self._known_bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes | None:
        token = self._full.id_to_token(token_id)
        if token is None:
            return None
        byte_of_char = self._byte_of_char
        if byte_of_char is None or not byte_of_char.keys() >= set(token):
            return str(token).encode()
        return bytes(map(byte_of_char.__getitem__, token))

    def find_special(self, text: str) -> str | None:
        """The first added token that a text spells; None for most texts."""
        match = self._added_token.search(text)
        return None if match is None else match.group()

    def skipped_beside(self, texts: frozenset[str]) -> frozenset[int]:
        """`skipped_token_ids` without the tokens that have one of these texts."""
        found = self._skipped_beside.get(texts)
        if found is None:
            found = frozenset(i for i in self.skipped_token_ids if self._added_texts[i] not in texts)
            self._skipped_beside[texts] = found
        return found

    def special_id(self, text: str) -> int | None:
        """The id of an added token; None if no added token has this text."""
        return self._added_ids.get(text)

    def special_text(self, token_id: int) -> str | None:
        """The text of an added token; None for other tokens."""
        return self._added_texts.get(token_id)


def read_eos_token_ids(directory: str | Path) -> tuple[int, ...]:
    """The end-of-sequence ids of `generation_config.json`, or else of `config.json`; empty if neither names one.

    In the config.json of a multimodal model they may be in `text_config`.
    """
    for name in ("generation_config.json", "config.json"):
        values = read_json(Path(directory) / name) or {}
        decoder = values.get("text_config")
        value = values.get("eos_token_id")
        if value is None and isinstance(decoder, Mapping):
            value = decoder.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ValueError(f"{Path(directory) / name}: eos_token_id must be an id or a list of ids, got {value!r}")
        if ids:
            return tuple(sorted(set(ids)))
    return ()


def _longest_token(spec: Mapping[str, Any]) -> int | None:
    """Length of the longest token of a byte-level vocabulary; None if it does not hold every byte of a text."""
    vocabulary: Mapping[str, int] = spec["model"]["vocab"]
    if spec.get("normalizer") is not None or not vocabulary.keys() >= set(byte_alphabet()):
        return None
    return max(map(len, vocabulary))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which no "
            "Unicode text contains; repair or drop it"
        ) from error


def _post_processor(
    spec: Mapping[str, Any], settings: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[str, Any] | None:
    """The `tokenizers` post-processor that adds begin- and end-of-sequence tokens to a prompt.

    As in transformers, the template in tokenizer.json decides if there is one. Otherwise `add_bos_token` and
    `add_eos_token` of tokenizer_config.json do; where neither is given, DeepSeek's begin-of-sequence token is added if
    the tokenizer has it.
    """
    add_bos, add_eos = settings.get("add_bos_token"), settings.get("add_eos_token")
    for name, value in (("add_bos_token", add_bos), ("add_eos_token", add_eos)):
        if not isinstance(value, bool | None):
            raise ValueError(f"{name} of tokenizer_config.json must be true or false, got {value!r}")
    post_processor: dict[str, Any] | None = spec.get("post_processor")
    if post_processor is not None and post_processor["type"] != "ByteLevel":  # which only moves offsets
        return post_processor
    if add_bos is None and add_eos is None:
        return _template((BOS, ids[BOS]) if BOS in ids else None, None)
    bos = _sentence_token(settings, "bos_token", ids) if add_bos else None
    eos = _sentence_token(settings, "eos_token", ids) if add_eos else None
    return _template(bos, eos)


def _template(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict[str, Any] | None:
    """A post-processor that puts `bos` before a text and `eos` after it; each is (text, id)."""
    if bos is None and eos is None:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    before, after = ([{"SpecialToken": {"id": t[0], "type_id": 0}}] if t else [] for t in (bos, eos))
    return {
        "type": "TemplateProcessing",
        "single": [*before, text, *after],
        "pair": [*before, text, {"Sequence": {"id": "B", "type_id": 1}}, *after],
        "special_tokens": {t[0]: {"id": t[0], "ids": [t[1]], "tokens": [t[0]]} for t in (bos, eos) if t},
    }


def _sentence_token(settings: Mapping[str, Any], name: str, ids: Mapping[str, int]) -> tuple[str, int] | None:
    """Text and id of a token that tokenizer_config.json names, or None if it names none."""
    value = settings.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    if not isinstance(text, str) or text not in ids:
        raise ValueError(f"tokenizer_config.json has {name} {text!r}, which tokenizer.json lacks; correct one of them")
    return text, ids[text]


def _without_added_tokens(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without added tokens: none to match, none in the vocabulary, no merge that makes one."""
    added = spec.get("added_tokens") or []
    contents, ids = {t["content"] for t in added}, {t["id"] for t in added}
    model = dict(spec["model"])
    unknown = model.get("unk_token")
    removed = {t for t, i in model["vocab"].items() if (t in contents or i in ids) and t != unknown}
    model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in removed}
    if "merges" in model and removed:
        model["merges"] = [m for m in model["merges"] if removed.isdisjoint(_merge_tokens(m))]
    return {**spec, "added_tokens": [], "truncation": None, "padding": None, "model": model}


def _merge_tokens(merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} {describe_file(path) or f'is not valid JSON: {error}'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
