"""InternLM's tokenizers, v1 and 2, as fast ones: from `tokenizer.model` alone, without the remote code around it.

The file is a sentencepiece model, a protobuf message; the few fields that matter are read here, which asks for neither
sentencepiece nor protobuf. Its rules are those both InternLM tokenizers have and no others: BPE with byte fallback,
text taken as it is, no space put before it.

Source: sentencepiece_model.proto of google/sentencepiece; tokenization_internlm2.py of InternLM.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BPE = 2
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def internlm_tokenizer(folder: Path, chat_names: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer of an InternLM checkpoint; it puts `<s>` in front, pads with `</s>`, and gives offsets.

    Args:
        chat_names: whether tokens go by the names that tokenizer_config.json gives them; chat models name some of the
            unused ones, `<|im_start|>` for `[UNUSED_TOKEN_146]`.

    Raises:
        FileNotFoundError: without a tokenizer.model.
        ValueError: if that file is none, or has rules that InternLM's has not.
    """
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise FileNotFoundError("no tokenizer.model, from which InternLM's tokenizer is made")
    try:
        pieces = _read_pieces(file.read_bytes())
    except (IndexError, KeyError, struct.error) as error:
        raise ValueError("tokenizer.model is no sentencepiece model") from error
    tokens = [text for text, _, _ in pieces]
    for position, text in (_renamed_tokens(folder) if chat_names else {}).items():
        if position < len(tokens):
            tokens[position] = text
    backend = Tokenizer(
        models.BPE(
            vocab={text: position for position, text in enumerate(tokens)},
            merges=_merges(pieces),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokens.index("<s>"))]
    )
    backend.add_tokens(
        [
            # Markers such as <|im_end|> or [UNUSED_TOKEN_145] are special, so that decoding can leave them out; other
            # user-defined pieces, rare letters mostly, are text.
            AddedToken(token, normalized=False, special=kind != _USER_DEFINED or token[0] in "<[")
            for token, (_, _, kind) in zip(tokens, pieces, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        padding_side="left",
    )


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The pairs that BPE merges, first the one whose whole scores highest; where scores tie, the earlier pieces."""
    normal = {text: (-score, position) for position, (text, score, kind) in enumerate(pieces) if kind == _NORMAL}
    pairs = [
        (text[:cut], text[cut:])
        for text in normal
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return sorted(pairs, key=lambda pair: (*normal[pair[0] + pair[1]], normal[pair[0]][1], normal[pair[1]][1]))


def _renamed_tokens(folder: Path) -> dict[int, str]:
    """Tokens of tokenizer_config.json by position."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    added: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
    return {int(position): token["content"] for position, token in added.items()}


def _read_pieces(message: bytes) -> list[tuple[str, float, int]]:
    """Text, score and kind of every piece."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(message):
        if field == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append((piece[1].decode("utf-8"), score, piece.get(3, _NORMAL)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    wanted = {
        "BPE": trainer.get(3) == _BPE,
        "byte fallback": bool(trainer.get(35)),
        "no normalisation": not normalizer.get(2),
        "no dummy prefix": normalizer.get(3) == 0,
        "whitespace kept": normalizer.get(4) == 0,
    }
    if lacking := [name for name, there in wanted.items() if not there]:
        raise ValueError(f"tokenizer.model is not InternLM's, which has {', '.join(lacking)}")
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a protobuf message; text, floats and messages are left as bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        yield key >> 3, message[position : position + size]
        position += size
