"""A teacher's next-token distributions on disk, instead of a teacher that runs.

A folder has ``bitlab_logits.json`` (how they were made) and ``logits-*.safetensors`` (what they
are). Each example is found by a hash of its token ids, so a dataset may be shuffled, padded and
read any number of times, and an example that was not there is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.train.recipe import Recipe
from bitlab_hf.train.teacher import check_causal

SETTINGS_FILE = "bitlab_logits.json"
VERSION = 1
_SHARD_BYTES = 2**28


@dataclass(frozen=True)
class TopLogits:
    """The likeliest tokens of n positions, and what is left for all others.

    Attributes:
        indices: int64 [n, k].
        probabilities: float32 [n, k].
        rest: float32 [n]; with the probabilities it adds up to 1.
    """

    indices: Tensor
    probabilities: Tensor
    rest: Tensor


def is_stored(path: object) -> bool:
    """Tells whether a path is a folder of `precompute_logits`."""
    return isinstance(path, (str, os.PathLike)) and (Path(path) / SETTINGS_FILE).is_file()


def hash_of(ids: Tensor) -> bytes:
    """Returns 16 bytes that stand for an example's token ids [n]."""
    return hashlib.blake2b(ids.to("cpu", torch.int32).numpy().tobytes(), digest_size=16).digest()


def tokens_of(example: Mapping[str, Any]) -> Tensor:
    """Returns an example's token ids without padding: int64 [n]."""
    ids = torch.as_tensor(example["input_ids"])
    mask = example.get("attention_mask")
    return ids if mask is None else ids[torch.as_tensor(mask).bool()]


@torch.no_grad()
def precompute_logits(
    teacher: Any,
    dataset: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> Path:
    """Writes a teacher's distributions over a dataset, for ``BitLabTrainer(teacher=path)``.

    Of each position the k likeliest tokens of ``softmax(logits / temperature)`` are kept: their
    logarithms in float16, their indices, and the probability of all others together; so a position
    takes ``6 k + 4`` bytes. Called again it adds the examples that the folder lacks: after a stop,
    or for more data.

    Args:
        teacher: A model, on its device, or the folder or hub name of one.
        dataset: Examples with ``input_ids`` and perhaps ``attention_mask``.
        path: The folder; made if needed.
        k: Tokens a position, at most the vocabulary.
        temperature: The one of the recipe that will use them.
        batch_size: Examples at a time.
        advance: Called with the number of examples done.

    Returns:
        The folder.

    Raises:
        ArgumentError: k, temperature or batch_size is not allowed, or the teacher is no causal
            language model.
        CheckpointError: The folder was made with other settings or a teacher of other weights, or
            writing failed (what was written whole is kept).
    """
    if not hasattr(teacher, "parameters"):
        from transformers import AutoModelForCausalLM

        teacher = AutoModelForCausalLM.from_pretrained(teacher)
    check_causal("precompute_logits", "teacher", teacher)
    teacher.eval()
    vocabulary = teacher.config.get_text_config().vocab_size
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= vocabulary:
        raise ArgumentError(f"precompute_logits: k must be from 1 to {vocabulary}, got {k!r}")
    if not temperature > 0:
        raise ArgumentError(f"precompute_logits: temperature must be above 0, got {temperature!r}")
    if batch_size < 1:
        raise ArgumentError(f"precompute_logits: batch_size must be at least 1, got {batch_size!r}")
    folder = Path(path)
    settings = {
        "version": VERSION, "vocab_size": vocabulary, "k": k, "temperature": float(temperature),
        "teacher": _fingerprint(teacher),
    }  # fmt: skip
    try:
        known = _open_folder(folder, settings)
        writer = _Writer(folder, k)
        for batch in _batches(dataset, known, batch_size, advance):
            writer.add(batch, _top(teacher, batch, k, temperature))
        writer.flush()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"precompute_logits: {folder} must be written whole, got {error}\n"
            "Call it again with the same data: it goes on with what is missing."
        ) from error
    return folder


def _open_folder(folder: Path, settings: dict[str, Any]) -> set[bytes]:
    """Returns the examples that a folder holds; makes it if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_stored(folder):
        write_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        return set()
    stored = StoredLogits(folder)
    different = [name for name, value in settings.items() if stored.settings.get(name) != value]
    if different:
        listed = ", ".join(
            f"{name} {settings[name]} (was {stored.settings.get(name)})" for name in different
        )
        raise CheckpointError(
            f"precompute_logits: settings must be those that {folder} was made with, got {listed}\n"
            "Write into another folder."
        )
    return set(stored.places)


def _batches(
    dataset: Iterable[Mapping[str, Any]],
    known: set[bytes],
    size: int,
    advance: Callable[[int], None] | None,
) -> Iterator[list[Tensor]]:
    """Yields the examples that are not known yet, each once."""
    batch: list[Tensor] = []
    for example in dataset:
        ids = tokens_of(example)
        key = hash_of(ids)
        if advance is not None:
            advance(1)
        if key in known or not len(ids):
            continue
        known.add(key)
        batch.append(ids)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _top(teacher: Any, batch: list[Tensor], k: int, temperature: float) -> list[dict[str, Tensor]]:
    """Runs the teacher; returns one dict of tensors an example, as the file holds them."""
    device = next(teacher.parameters()).device
    padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
    lengths = torch.tensor([len(ids) for ids in batch], device=device)
    mask = torch.arange(padded.shape[1], device=device) < lengths[:, None]
    logits = teacher(input_ids=padded, attention_mask=mask.long()).logits
    found = []
    for row, ids in zip(logits, batch, strict=True):
        values = (row[: len(ids)].float() / temperature).log_softmax(-1)
        top, indices = values.topk(k, -1)
        rest = values.scatter(-1, indices, -torch.inf).exp().sum(-1)
        found.append({
            "logprobs": top.clamp(min=torch.finfo(torch.float16).min).half().cpu(),
            "indices": indices.int().cpu(),
            "rest": rest.cpu(),
        })  # fmt: skip
    return found


class _Writer:
    """Collects examples and writes them in shards, each beside itself and then renamed."""

    def __init__(self, folder: Path, k: int) -> None:
        self._folder, self._bytes_of_token = folder, 6 * k + 4
        self._rows: list[dict[str, Tensor]] = []
        self._keys: list[bytes] = []
        self._tokens = 0
        self._number = 1 + max(map(_number_of, folder.glob("logits-*.safetensors")), default=0)

    def add(self, batch: list[Tensor], rows: list[dict[str, Tensor]]) -> None:
        self._keys += map(hash_of, batch)
        self._rows += rows
        self._tokens += sum(map(len, batch))
        if self._tokens * self._bytes_of_token >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        lengths = [len(row["rest"]) for row in self._rows]
        tensors = {name: torch.cat([row[name] for row in self._rows]) for name in self._rows[0]}
        tensors["ends"] = torch.tensor(lengths).cumsum(0)
        tensors["hashes"] = torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8)
        file = self._folder / f"logits-{self._number:05d}.safetensors"
        staged = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            save_file(tensors, staged)
            staged.replace(file)
        finally:
            staged.unlink(missing_ok=True)
        self._number += 1
        self._rows, self._keys, self._tokens = [], [], 0


def _number_of(file: Path) -> int:
    return int(file.stem.removeprefix("logits-"))


def _fingerprint(model: Any) -> str:
    """Returns a hash of some values of every parameter: another teacher has another one."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 256)]
        digest.update(name.encode())
        digest.update(values.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


class StoredLogits:
    """Reads a folder of `precompute_logits`.

    Attributes:
        settings: What ``bitlab_logits.json`` holds.
        places: For each example's hash: its shard, its first row there, and the row after its last.

    Raises:
        CheckpointError: A file is damaged or of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = Path(path)
        self.places: dict[bytes, tuple[Any, int, int]] = {}
        try:
            self.settings = json.loads((self.folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            if self.settings["version"] != VERSION:
                raise ValueError(f"version {self.settings['version']}")
            for file in sorted(self.folder.glob("logits-*.safetensors")):
                shard = safe_open(file, framework="pt")
                ends = [0, *shard.get_tensor("ends").tolist()]
                hashes = shard.get_tensor("hashes").numpy().tobytes()
                for number, (start, end) in enumerate(pairwise(ends)):
                    self.places[hashes[16 * number : 16 * number + 16]] = (shard, start, end)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"BitLabTrainer: {self.folder} must hold whole files of precompute_logits, got "
                f"{error}\nDelete the damaged file and call precompute_logits again."
            ) from error

    def read(self, ids: Tensor, mask: Tensor, labelled: Tensor) -> TopLogits:
        """Returns the distributions of a batch's labelled positions, in order.

        Args:
            ids: Token ids [B, L].
            mask: bool [B, L], True where a token is.
            labelled: bool [B, L], True where a distribution is wanted; only where a token is.

        Raises:
            CheckpointError: An example of the batch is not there.
        """
        parts: list[list[Tensor]] = [[], [], []]
        for row, tokens, wanted in zip(ids.cpu(), mask.cpu(), labelled.cpu(), strict=True):
            example = row[tokens]
            place = self.places.get(hash_of(example))
            if place is None:
                raise CheckpointError(
                    f"BitLabTrainer: {self.folder} must hold every example of train_dataset, got "
                    f"one of {len(example)} tokens that it lacks, beginning with "
                    f"{example[:8].tolist()}\nThe data has changed: call precompute_logits again "
                    "with it and the same folder; it adds what is missing."
                )
            shard, start, end = place
            chosen = wanted[tokens]
            for part, name in zip(parts, ("indices", "logprobs", "rest"), strict=True):
                part.append(shard.get_slice(name)[start:end][chosen])
        indices, logprobs, rest = (torch.cat(part).to(ids.device) for part in parts)
        # float16 rounds: what is left is shared out again, so that it adds up to 1.
        p = logprobs.float().exp()
        p = p * ((1 - rest) / p.sum(-1))[:, None]
        return TopLogits(indices.long(), p, rest)


def check_stored(settings: Mapping[str, Any], model: Any, recipe: Recipe) -> None:
    """Checks that stored logits serve a model and a recipe.

    Raises:
        ArgumentError: They do not.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if settings["vocab_size"] != vocabulary:
        raise ArgumentError(
            f"BitLabTrainer: teacher must have the model's vocabulary of {vocabulary} tokens, got "
            f"stored logits of {settings['vocab_size']}"
        )
    if recipe.hidden_weight or recipe.relation_weight or recipe.teacher_8bit:
        raise ArgumentError(
            "BitLabTrainer: recipe must have no hidden_weight, relation_weight or teacher_8bit "
            "with stored logits, got one\nGive the teacher itself for these."
        )
    if settings["temperature"] != recipe.temperature:
        raise ArgumentError(
            f"BitLabTrainer: temperature must be the {settings['temperature']} of the stored "
            f"logits, got {recipe.temperature}\nCall precompute_logits for it, into another folder."
        )
