"""Make a fast tokenizer from the `tokenizer.model` of an InternLM, v1 or 2, or of a Llama, without running code of it.

The file is a sentencepiece model, a protobuf message. Only the rules of these tokenizers are supported: BPE with byte
fallback, no normalisation of text, and with InternLM no space put before it.

Source: tokenization_internlm2.py of InternLM.
"""

import json
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from collavo.hub import refuse_pointer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BPE = 2
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def internlm_tokenizer(folder: Path, chat_names: bool = True) -> PreTrainedTokenizerFast:
    """Make the tokenizer of an InternLM checkpoint; it puts `<s>` in front and pads with `</s>`.

    Args:
        chat_names: whether to take the names of tokens from tokenizer_config.json, in which chat models rename unused
            tokens: `<|im_start|>` for `[UNUSED_TOKEN_146]`.

    Raises:
        FileNotFoundError: without a tokenizer.model.
        ValueError: if that file is no sentencepiece model, or has other rules than InternLM's.
    """
    pieces = _read_pieces(folder / "tokenizer.model", "InternLM", space_before=False)
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
            # Markers such as <|im_end|> or [UNUSED_TOKEN_145] are special, so that decoding can leave them out. The
            # other user-defined pieces, mostly rare letters, are text.
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


def llama_tokenizer(folder: Path) -> LlamaTokenizer:
    """Make the tokenizer of a Llama, 1 or 2, a Vicuna, or another of their kind, that has no tokenizer.json; the legacy
    one, as transformers calls it.

    Raises:
        FileNotFoundError, ValueError: as `internlm_tokenizer`.
    """
    pieces = _read_pieces(folder / "tokenizer.model", "Llama", space_before=True)
    added = _added_tokens(folder)
    pieces = [
        (added.get(position, text), score, _CONTROL if position in added else kind)
        for position, (text, score, kind) in enumerate(pieces)
    ]
    vocabulary = {text: position for position, (text, _, _) in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=_merges(pieces), legacy=True, add_bos_token=True)
    # Of control tokens beside those that all have, as [INST] in Mistral's, a text would else be spelled.
    known = set(tokenizer.all_special_tokens)
    added |= {
        position: text
        for position, (text, _, kind) in enumerate(pieces)
        if kind in (_CONTROL, _USER_DEFINED) and text not in known
    }
    added = {position: text for position, text in added.items() if text not in known}
    for position, text in sorted(added.items()):
        if position > len(tokenizer):
            raise ValueError(
                f"its added token {text!r} has the number {position}, but the next one is {len(tokenizer)}"
            )
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=text[0] in "<[")])
    config = _json_in(folder / "tokenizer_config.json")
    for name in ("bos_token", "eos_token", "pad_token"):
        stated = config.get(name)
        token = stated.get("content") if isinstance(stated, dict) else stated
        if token in tokenizer.get_vocab():
            setattr(tokenizer, name, token)
    return tokenizer


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """List the pairs that BPE merges, in order.

    sentencepiece keeps no list of merges: it joins the two neighbours whose joint piece has the highest score. A fast
    tokenizer needs the list, so every split of a piece into two pieces becomes a merge, ranked by the score of the
    whole; among equal scores the earlier pieces come first.
    """
    normal = {text: (-score, position) for position, (text, score, kind) in enumerate(pieces) if kind == _NORMAL}
    pairs = [
        (text[:cut], text[cut:])
        for text in normal
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return sorted(pairs, key=lambda pair: (*normal[pair[0] + pair[1]], normal[pair[0]][1], normal[pair[1]][1]))


def _renamed_tokens(folder: Path) -> dict[int, str]:
    """Read the tokens of tokenizer_config.json, by position."""
    added: dict[str, Any] = _json_in(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    return {int(position): token["content"] for position, token in added.items()}


def _added_tokens(folder: Path) -> dict[int, str]:
    """Read the tokens that a fine-tuning has added, by position: of tokenizer_config.json, or of the older file."""
    return _renamed_tokens(folder) or {int(n): text for text, n in _json_in(folder / "added_tokens.json").items()}


def _json_in(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _read_pieces(file: Path, family: str, space_before: bool) -> list[tuple[str, float, int]]:
    """Read text, score and kind of every piece; the numbers are those of sentencepiece_model.proto."""
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer.model, from which {family}'s tokenizer is made")
    refuse_pointer(file)
    # Not above: where a process has loaded sentencepiece's own description of the format, this one cannot be loaded.
    from transformers.utils.sentencepiece_model_pb2_new import ModelProto  # type: ignore[attr-defined]  # made at import

    try:
        model = ModelProto.FromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError("tokenizer.model is no sentencepiece model") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    wanted = {
        "BPE": trainer.model_type == _BPE,
        "byte fallback": trainer.byte_fallback,
        "no normalisation": not normalizer.precompiled_charsmap,
        "a dummy prefix" if space_before else "no dummy prefix": normalizer.add_dummy_prefix == space_before,
        "whitespace kept": not normalizer.remove_extra_whitespaces,
    }
    if lacking := [name for name, there in wanted.items() if not there]:
        raise ValueError(f"tokenizer.model is not {family}'s, which has {', '.join(lacking)}")
    return [(piece.piece, piece.score, piece.type) for piece in model.pieces]
