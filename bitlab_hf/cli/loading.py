"""What the commands load: a model's scheme, its tokenizer, its weights, whole or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.cli.errors import describe, doing
from bitlab_hf.cli.places import check_files, check_folder

DAMAGED = "It is damaged, or not what its configuration says; fetch or write it again."

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NUMBER = re.compile(r"\b\d+\b")
# What a layer's own tensors are called in a file; buffers of other names may be left over.
_LEAVES = (
    "weight", "bias", "qweight", "qweight_scale", "qweight_multiplier", "weight_scale",
    "learned_scale",
)  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip
# No code but transformers' own runs, and nobody is asked: the answer may come from a pipe.
_SAFE: dict[str, Any] = {"trust_remote_code": False}


def read_scheme(source: str) -> dict[str, Any] | None:
    """Returns the quantization_config of a model; None of a float one, a GGUF file's included.

    Raises:
        ConfigError: BitLab does not know the scheme; see `find_scheme` for the rest.
    """
    from bitlab_hf.checkpoint.files import scheme_of

    with doing(f"reading the configuration of {source}", DAMAGED, source):
        return scheme_of(find_scheme(source), source)


def is_gguf(source: str) -> bool:
    """Tells whether a source is named like a GGUF file."""
    return source.lower().endswith(".gguf") and not Path(source).is_dir()


def find_scheme(source: str) -> Any:
    """Returns the quantization_config of a model, whoever wrote it.

    Args:
        source: A folder, a name of the hub, or a GGUF file, which has none.

    Raises:
        ArgumentError: It is none of these, the hub does not give it, or it needs code of its own.
        CheckpointError: config.json is damaged, or weights are missing or lie elsewhere.
    """
    from bitlab_hf.checkpoint.files import INDEX, read_config, weight_files

    path = Path(source)
    if is_gguf(source):
        check_files([path])
        if not path.is_file():
            raise ArgumentError(f"{source}: the model must be a GGUF file, got no such file")
        return None
    if source and path.is_dir():
        check_folder(path)
        with doing(f"reading {path / 'config.json'}", DAMAGED):
            fields = read_config(path)
            _check_no_code(source, fields)
        if (path / INDEX).exists():
            weight_files(path, source)
        return fields.get("quantization_config")
    # A link that leads nowhere is no name of the hub.
    if path.exists() or path.is_symlink() or not _HUB_NAME.fullmatch(source):
        raise ArgumentError(f"{source}: the model must be a folder or a hub name, got neither")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, **_SAFE)
    except OSError as error:
        raise ArgumentError(
            f"{source}: the model must be a folder, or on the hub and within reach, got: "
            f"{str(error).splitlines()[0]}\nCheck the name and the connection; run `hf auth login` "
            "for what is private."
        ) from error
    except ValueError as error:
        if not _asks_for_code(error):
            raise
        raise _code_error(source, "auto_map") from error
    return getattr(config, "quantization_config", None)


def _check_no_code(source: str, fields: dict[str, Any]) -> None:
    """Refuses a folder whose classes are code that lies in it, rather than in transformers."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    named, kind = fields.get("auto_map"), fields.get("model_type")
    if not named:
        return
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or kind not in CAUSAL:
        raise _code_error(source, f"auto_map in config.json for the model type {kind!r}")


def _code_error(source: str, got: str) -> ArgumentError:
    return ArgumentError(
        f"{source}: the model must be of a class that transformers itself has, got {got}\n"
        "BitLab's commands run no code of a model; load it in Python, with trust_remote_code=True, "
        "if you trust it."
    )


def _asks_for_code(error: Exception) -> bool:
    """Tells whether transformers wanted to run a model's own code."""
    return "trust_remote_code" in str(error)


def check_source(source: str) -> str:
    """Returns a folder or a name of the hub as it was given, checked as `read_scheme` does.

    Raises:
        ArgumentError: It is a GGUF file.
    """
    if is_gguf(source):
        raise ArgumentError(
            f"{source}: the model must be a folder or a hub name, got a GGUF file\n"
            "Import a ternary one with bitlab import; deploy, train and eval take any."
        )
    read_scheme(source)
    return source


def check_unpacked(source: str, op: str, fix: str) -> dict[str, Any] | None:
    """Returns the scheme of a model with float weights, latent or not.

    Raises:
        ArgumentError: The model is deployed, or of transformers' bitnet method.
    """
    scheme = read_scheme(source)
    if scheme is not None and scheme["quant_method"] == "bitnet":
        raise ArgumentError(
            f"{op}: the model must be latent or float, got one of transformers' bitnet method\n"
            "Make it BitLab's first: bitlab import."
        )
    if scheme is not None and scheme.get("weight_format") == "packed":
        raise ArgumentError(f"{op}: the model must be latent or float, got a deployed one\n{fix}")
    return scheme


def check_trainable(source: str, op: str) -> dict[str, Any] | None:
    """Returns the scheme of a model that can be trained.

    Raises:
        ArgumentError: Its weights are packed.
    """
    fix = "Train the latent model that it was made from, or adapters (scripts/finetune_lora.py)."
    return check_unpacked(source, op, fix)


def load_tokenizer(source: str) -> Any:
    """Returns a model's tokenizer.

    Raises:
        ArgumentError: There is none.
    """
    from transformers import AutoTokenizer

    with doing(f"loading the tokenizer of {source}", DAMAGED):
        try:
            return AutoTokenizer.from_pretrained(source, **_SAFE)
        except (OSError, ValueError) as error:
            if _asks_for_code(error):
                raise _code_error(source, "auto_map in tokenizer_config.json") from error
            raise ArgumentError(
                f"{source}: the model must have a tokenizer, got none ({_first_sentence(error)})\n"
                "Save one into the folder: tokenizer.save_pretrained(folder)."
            ) from error


def tokenizer_if_any(source: str) -> Any:
    """Returns a model's tokenizer, or None where it has none.

    Raises:
        ArgumentError: The folder holds one that cannot be loaded.
    """
    folder = Path(source)
    if folder.is_dir():
        held = any((folder / name).exists() for name in _TOKENIZER_FILES)
        return load_tokenizer(source) if held else None
    try:
        return load_tokenizer(source)
    except ArgumentError:
        return None


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0]


def load_model(source: str, **options: Any) -> Any:
    """Loads a causal language model, in eval mode: a float one, BitLab's or bitnet's.

    Args:
        source: A folder or a name of the hub.
        options: Passed to ``from_pretrained``.

    Raises:
        CheckpointError: The files lack a weight of the model, or hold one of another shape or one
            too many: transformers would go on with random values.
    """
    scheme = read_scheme(source)
    if scheme is not None and scheme["quant_method"] == "bitnet":
        from bitlab_hf import load_bitnet

        return load_whole(load_bitnet, source, source, **options).eval()
    from transformers import AutoModelForCausalLM

    return load_whole(AutoModelForCausalLM.from_pretrained, source, source, **options).eval()


def load_skeleton(source: str) -> Any:
    """Returns a causal language model without weights.

    Args:
        source: A folder or a name of the hub that `find_scheme` has checked.

    Raises:
        CheckpointError: config.json makes no model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitlab_hf.interop.skeleton import building

    with doing(f"reading the configuration of {source}", DAMAGED, source):
        config = AutoConfig.from_pretrained(source, **_SAFE)
        with building(source, "loading the model"):
            return AutoModelForCausalLM.from_config(config, **_SAFE)


def load_whole(load: Any, name: str, *given: Any, **options: Any) -> Any:
    """Calls a ``from_pretrained`` and checks that it made nothing up.

    Args:
        load: What loads.
        name: The model, for error messages.
        given: The call's arguments.
        options: Its options.

    Raises:
        CheckpointError: See `load_model`.
    """
    whole = {**_SAFE, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with doing(f"loading the model {name}", DAMAGED, name), _kept_report() as reports:
        try:
            model, info = load(*given, **whole, **options)
        except ValueError as error:
            if not _asks_for_code(error):
                raise
            raise _code_error(name, "auto_map") from error
        except RuntimeError as error:
            if not reports:
                raise
            raise CheckpointError(
                f"{name}: the weights must fit the model, got {reports[-1]}\n{DAMAGED}"
            ) from error
    _check_whole(name, model, info)
    return model


def _check_whole(name: str, model: Any, info: dict[str, Any]) -> None:
    kind = type(model).__name__
    missing = set(info["missing_keys"])
    shapes = {key: (stored, wanted) for key, stored, wanted in info["mismatched_keys"]}
    missing -= shapes.keys()
    if missing:
        raise CheckpointError(
            f"{name}: the files must hold every weight of {kind}, got none of {_listed(missing)}\n"
            "They are incomplete, or another model's; fetch or write them again."
        )
    if shapes:
        key = min(shapes)
        stored, wanted = (list(shape) for shape in shapes[key])
        more = f", and {len(shapes) - 1} more of other shapes" if len(shapes) > 1 else ""
        raise CheckpointError(
            f"{name}: {key} must be {wanted} in {kind}, got {stored}{more}\n"
            "config.json and the tensors do not belong together."
        )
    left = {key for key in info["unexpected_keys"] if _is_of_a_layer(model, key)}
    if left:
        raise CheckpointError(
            f"{name}: every weight in the files must have a place in {kind}, got {_listed(left)} "
            "without one\nconfig.json and the tensors do not belong together."
        )


def _is_of_a_layer(model: Any, key: str) -> bool:
    """Tells whether a tensor that found no place belongs to a layer that the model has, or to one
    like those that it has: a bias that would be dropped, blocks beyond the configured number.
    """
    parent, _, leaf = key.rpartition(".")
    if leaf not in _LEAVES:
        return False
    own = {name for name, module in model.named_modules() if len(module._parameters)}
    return _NUMBER.sub("*", parent) in {_NUMBER.sub("*", name) for name in own}


def _listed(keys: set[str]) -> str:
    shown = sorted(keys)[:3]
    more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
    return ", ".join(shown) + more


@contextmanager
def _kept_report() -> Iterator[list[str]]:
    """Keeps what transformers reports of a conversion of weights that failed, which it prints and
    does not put into its error.
    """
    kept: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "CONVERSION" in text:
                rows = [line for line in text.splitlines() if "CONVERSION" in line and "|" in line]
                kept.append("; ".join(describe(ArgumentError(row)) for row in rows[:3]))

    logger, handler = logging.getLogger("transformers.modeling_utils"), Keep()
    level, passes = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield kept
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passes
