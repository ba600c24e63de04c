"""Tokenizers of SentencePiece's kind in a GGUF file: BPE over whole texts with bytes as a fallback.

llama.cpp joins the neighbours that make the token of the highest score, whatever they are;
``tokenizers`` joins the pairs of a list in its order. Both do the same exactly where the list holds
every pair that makes a token, and all pairs of a token stand together: then a score is minus the
place in the list.
"""

from __future__ import annotations

import re
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from bitcore.errors import ArgumentError, CheckpointError

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_REFUSAL = "\nConvert the float model with llama.cpp's own script, or use bitlab_hf.save."
# Of tokens that no pair makes: below every place in a list.
_NEVER = -1e9


def is_byte(text: str) -> bool:
    """Tells whether a token stands for one byte."""
    return _BYTE.fullmatch(text) is not None


def space_prefix(content: dict[str, Any]) -> bool:
    """Returns whether a tokenizer of this kind puts a space before a text.

    Args:
        content: What tokenizer.json holds.

    Raises:
        ArgumentError: It changes texts, or parts them, in another way.
    """
    normalizer, splits = content.get("normalizer"), content.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    replaces, prefix = False, False
    for step in steps:
        replaced = step.get("pattern") == {"String": " "} and step.get("content") == _SPACE
        if step.get("type") == "Replace" and replaced:
            replaces = True
        elif step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        else:
            raise _unknown("normalizer", step)
    if splits is not None:
        whole = splits.get("type") == "Metaspace" and splits.get("split") is False
        # Where no space is left, this parts nothing.
        spaces = splits.get("type") == "Split" and splits.get("pattern") == {"String": " "}
        if whole:
            replaces, prefix = True, prefix or splits.get("prepend_scheme") != "never"
        elif not (spaces and replaces):
            raise _unknown("pre_tokenizer", splits)
    if not replaces:
        raise _unknown("normalizer", normalizer)
    return prefix


def _unknown(part: str, got: Any) -> ArgumentError:
    return ArgumentError(
        f"export_gguf: the tokenizer's {part} must be SentencePiece's, got {got!r:.120}{_REFUSAL}"
    )


def scores_of(model: dict[str, Any], added: set[str], tokens: list[str]) -> list[float]:
    """Returns the score of each token.

    Args:
        model: The ``model`` of tokenizer.json.
        added: Tokens that are found in a text before it is parted.
        tokens: By their numbers.

    Raises:
        ArgumentError: Scores cannot say what the pairs of the list do.
    """
    vocabulary: dict[str, int] = model["vocab"]
    held = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
            for pair in model["merges"]]  # fmt: skip
    made: dict[str, int] = {}
    last = ""
    for place, (left, right) in enumerate(held):
        token = left + right
        if token != last and token in made:
            raise ArgumentError(
                f"export_gguf: the pairs that make {token!r} must stand together in the merges, "
                f"got others between them{_REFUSAL}"
            )
        made.setdefault(token, place)
        last = token
    wanted = {
        pair
        for token in vocabulary
        if token not in added and not is_byte(token)
        for pair in _pairs(token, vocabulary)
    }
    lacking = wanted - set(held)
    if lacking or not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        what = f"the pair {min(lacking)!r}" if lacking else "a token for every byte"
        raise ArgumentError(
            f"export_gguf: a tokenizer with byte_fallback must hold {what}, as SentencePiece has "
            f"it, got none{_REFUSAL}"
        )
    return [-float(made[text]) if text in made else _NEVER for text in tokens]


def _pairs(token: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Returns the pairs of tokens that make a token."""
    cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]


def rebuild(
    vocabulary: dict[str, int],
    added: set[str],
    scores: list[float],
    unknown: str | None,
    prefix: bool,
) -> Tokenizer:
    """Returns the tokenizer of a file's tokens and scores.

    Args:
        vocabulary: Number of each token.
        added: Tokens that are found in a text before it is parted.
        scores: By the tokens' numbers.
        unknown: The token for what is unknown.
        prefix: Whether a space is put before a text.

    Raises:
        CheckpointError: There is not a finite score for each token.
    """
    if len(scores) <= max(vocabulary.values(), default=0) or not all(
        isinstance(score, float) and score == score for score in scores
    ):
        raise CheckpointError("load_gguf: tokenizer.ggml.scores must be a number for each token")
    ranked = sorted(
        (-scores[number], number, pair)
        for token, number in vocabulary.items()
        if token not in added and not is_byte(token)
        for pair in _pairs(token, vocabulary)
    )
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for _, _, pair in ranked],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", _SPACE)
    first = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, replace])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
