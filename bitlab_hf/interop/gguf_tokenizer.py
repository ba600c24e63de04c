"""A tokenizer in a GGUF file: byte-level BPE, as Llama 3 and Qwen have it, or SentencePiece's."""

from __future__ import annotations

import json
import tempfile
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as splitting
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.interop.gguf_sentencepiece import is_byte, rebuild, scores_of, space_prefix

if TYPE_CHECKING:
    import gguf

# How text is split, by llama.cpp's name; the patterns are those of the tokenizers' own files.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
_SPLITS = {name: pattern for pattern, name in _PATTERNS.items()}


def find_tokenizer(model: PreTrainedModel, tokenizer: Any) -> Any:
    """Returns the tokenizer that was given, or the one where the model came from.

    Raises:
        ArgumentError: There is none, or it is no fast tokenizer.
    """
    if tokenizer is None:
        source = str(getattr(model.config, "_name_or_path", "") or "")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, TypeError) as error:
            raise ArgumentError(
                f"export_gguf: the model must come with a tokenizer, got none in {source!r}\n"
                "Pass tokenizer=AutoTokenizer.from_pretrained(...)."
            ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ArgumentError(
            "export_gguf: tokenizer must be a fast tokenizer (tokenizer.json), "
            f"got {type(tokenizer).__name__}"
        )
    return tokenizer


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: Any, rows: int, pre_tokenizer: str | None
) -> None:
    """Writes a tokenizer's vocabulary, merges, special tokens and chat template.

    Args:
        writer: The file.
        tokenizer: A fast tokenizer.
        rows: Rows of the embedding; the vocabulary is filled up to it.
        pre_tokenizer: llama.cpp's name of how text is split, or None to find it.

    Raises:
        ArgumentError: It is no BPE, its way of splitting is unknown, or it has more tokens than
            the embedding has rows.
    """
    import gguf

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise ArgumentError(
            f"export_gguf: tokenizer must be a BPE, got {model.get('type')}\n"
            "Convert the float model with llama.cpp's own script, or use bitlab_hf.save."
        )
    pieces = bool(model.get("byte_fallback"))
    prefix = space_prefix(content) if pieces else False
    pre = "default" if pieces else pre_tokenizer or _pre_tokenizer(content.get("pre_tokenizer"))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise ArgumentError(
            f"export_gguf: tokenizer must have at most {rows} tokens, as the embedding has rows, "
            f"got {max(vocabulary.values()) + 1}"
        )
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    for text, index in vocabulary.items():
        kind = gguf.TokenType.BYTE if pieces and is_byte(text) else gguf.TokenType.NORMAL
        tokens[index], types[index] = text, kind
    for added in content.get("added_tokens", []):
        special = added["special"]
        kinds = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        types[added["id"]] = kinds
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if pieces:
        own = {added["content"] for added in content.get("added_tokens", [])}
        writer.add_token_scores(scores_of(model, own, tokens))
        writer.add_add_space_prefix(prefix)
        if model.get("unk_token") in vocabulary:
            types[vocabulary[model["unk_token"]]] = gguf.TokenType.UNKNOWN
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special_tokens = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=rows)
        special_tokens.add_to_gguf(writer, quiet=True)
    if "bos" not in special_tokens.add_special_token:
        # What the tokenizer itself puts before a text.
        first = tokenizer("a")["input_ids"][:1]
        writer.add_add_bos_token(first == [tokenizer.bos_token_id])


def _pre_tokenizer(content: dict[str, Any] | None) -> str:
    parts = (content or {}).get("pretokenizers", [content or {}])
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    patterns = [
        part.get("pattern", {}).get("Regex") for part in parts if part.get("type") == "Split"
    ]
    if levels and not patterns and len(parts) == 1 and levels[0].get("use_regex"):
        return "gpt-2"
    if levels and len(parts) == 2 and len(patterns) == 1 and patterns[0] in _PATTERNS:
        return _PATTERNS[patterns[0]]
    raise ArgumentError(
        "export_gguf: the tokenizer must split text in a way that is known to llama.cpp "
        f"({', '.join(['gpt-2', *_PATTERNS.values()])}), got {[p.get('type') for p in parts]}\n"
        'Pass pre_tokenizer="..." with llama.cpp\'s name of it.'
    )


def rebuild_tokenizer(fields: dict[str, Any]) -> Any:
    """Returns a GGUF file's tokenizer; None if its kind is not one that `add_tokenizer` writes.

    transformers' own reader of GGUF tokenizers is not used: it does not look at how text is split,
    and knows no ``bitnet``.

    Args:
        fields: The file's fields.

    Raises:
        CheckpointError: The vocabulary, its merges or an index into it are damaged.
    """
    import gguf

    def field(name: str, kind: type, default: Any) -> Any:
        value = fields.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, kind):
            raise CheckpointError(
                f"load_gguf: tokenizer.ggml.{name} must be of the type {kind.__name__}, "
                f"got {value!r:.80}"
            )
        return value

    tokens, pre = field("tokens", list, []), field("pre", str, "")
    pieces = field("model", str, "") == "llama" and pre in ("", "default")
    if not pieces and (field("model", str, "") != "gpt2" or pre not in ("gpt-2", *_SPLITS)):
        return None
    types = field("token_type", list, [gguf.TokenType.NORMAL] * len(tokens))
    pairs = field("merges", list, [])
    texts = all(isinstance(text, str) for text in (*tokens, *pairs))
    merges: list[Any] = [tuple(merge.split(" ")) for merge in pairs] if texts else []
    held = [n for n in ("bos", "eos", "pad", "unk") if f"tokenizer.ggml.{n}_token_id" in fields]
    special = {name: field(f"{name}_token_id", int, 0) for name in held}
    whole = texts and len(set(tokens)) == len(types) == len(tokens)
    indices = all(0 <= index < len(tokens) for index in special.values())
    if not whole or not indices or any(len(merge) != 2 for merge in merges):
        raise CheckpointError("load_gguf: the tokenizer must be whole, got a damaged one")
    kinds = dict(zip(tokens, types, strict=True))
    unused = {text for text, kind in kinds.items() if kind == gguf.TokenType.UNUSED}
    vocabulary = {text: index for index, text in enumerate(tokens) if text not in unused}
    if pieces:
        named = [text for text, kind in kinds.items() if kind == gguf.TokenType.UNKNOWN]
        scores = field("scores", list, [])
        prefix = field("add_space_prefix", bool, True)
        pieces_alone = (gguf.TokenType.NORMAL, gguf.TokenType.BYTE)
        added = {text for text, kind in kinds.items() if kind not in pieces_alone}
        backend = rebuild(vocabulary, added, scores, named[0] if named else None, prefix)
    else:
        backend = _byte_level(vocabulary, merges, pre)
    # llama.cpp puts the first token before such texts unless the file says otherwise.
    if field("add_bos_token", bool, pieces) and "bos" in special:
        first = tokens[special["bos"]]
        backend.post_processor = TemplateProcessing(
            single=[first, "$A"],
            pair=[first, "$A", first, "$B:1"],
            special_tokens=[(first, special["bos"])],
        )
    for text, kind in kinds.items():
        if kind == gguf.TokenType.CONTROL:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == gguf.TokenType.USER_DEFINED:
            backend.add_tokens([AddedToken(text, special=False, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[index] for name, index in special.items()},
    )
    template = fields.get("tokenizer.chat_template")
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def _byte_level(vocabulary: dict[str, int], merges: list[Any], pre: str) -> Tokenizer:
    """Returns a byte-level BPE without its special tokens."""
    try:
        bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:
        # Of no class of its own: a merge of a token that is not there.
        raise CheckpointError(
            f"load_gguf: the merges must be of tokens in the vocabulary, got: {error}"
        ) from error
    backend = Tokenizer(bpe)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    level = splitting.ByteLevel(add_prefix_space=False, use_regex=pre == "gpt-2")
    split = [splitting.Split(Regex(_SPLITS[pre]), "isolated")] if pre in _SPLITS else []
    backend.pre_tokenizer = splitting.Sequence([*split, level]) if split else level
    backend.decoder = decoders.ByteLevel()
    return backend
