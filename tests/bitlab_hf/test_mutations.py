"""Thousands of damaged files, new ones each run: each loads as before, or says what is wrong.

No crash, no hang, no error that is not ours to give, and no other outputs without a word, unless
the damage made a legal value of another. ``BITLAB_MUTATION_SEED`` repeats a run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import secrets
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bitcore.errors import BitLabError
from bitlab_hf import (
    BitLabConfig,
    convert_ternary,
    export_bitnet,
    export_gguf,
    load_bitnet,
    load_gguf,
    save,
)
from tests.bitlab_hf.interop.test_gguf import DEMO
from tests.bitlab_hf.mutations import GGUF, SAFETENSORS, Mutation

ROOT = str(Path(__file__).parents[2])
OURS = tuple(f"{ROOT}/{name}/" for name in ("bitcore", "bitlayers", "bitlab_hf", "bitlab_autoload"))
# A case takes a fraction of a second.
PATIENCE = 30.0
IDS = torch.arange(3, 11).view(1, 8)


def load_stock(folder: Path) -> tuple[Any, bool]:
    """Loads a folder; returns the model, and whether a report named tensors that were made up."""
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model, bool(said["missing_keys"] or said["mismatched_keys"])


def load_stock_bitnet(folder: Path) -> tuple[Any, bool]:
    model, said = load_bitnet(folder, output_loading_info=True)  # type: ignore[misc]
    return model, bool(said["missing_keys"] or said["mismatched_keys"])


def load_converted(folder: Path) -> tuple[Any, bool]:
    convert_ternary(folder, folder / "out")
    return load_stock(folder / "out")


def load_imported(folder: Path) -> tuple[Any, bool]:
    return load_gguf(folder / "model.gguf"), False


LOADERS: dict[str, Callable[[Path], tuple[Any, bool]]] = {
    "deployed": load_stock,
    "int8 head": load_stock,
    "sharded": load_stock,
    "latent": load_stock,
    "groups": load_stock,
    "latent groups": load_stock,
    "float groups": load_stock,
    "bitnet": load_stock_bitnet,
    "ternary": load_converted,
    "gguf": load_imported,
}


def ternary_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, **changes}
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "proj" in name:
                parameter.copy_(torch.randint(-1, 2, parameter.shape) * 0.03)
    return model.to(torch.bfloat16)


def make(name: str, folder: Path) -> None:
    """Writes a whole model of a kind."""
    if name == "gguf":
        make_gguf(folder)
        return
    source = folder.with_name(f"{folder.name}-source")
    ternary_model().save_pretrained(source)
    if name == "ternary":
        source.rename(folder)
        return
    mode = "auto" if name.startswith("latent") else "infer"
    config = BitLabConfig(mode=mode, head="int8" if name == "int8 head" else "keep")
    if name == "sharded":
        config = BitLabConfig(mode=mode, weight_granularity="per_channel")
    elif name.endswith("groups"):
        kind = "float32" if name == "float groups" else "uint8"
        config = BitLabConfig(
            mode=mode, weight_granularity="per_group", group_size=64, group_scale_dtype=kind
        )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    if name == "bitnet":
        export_bitnet(model, folder)
    else:
        save(model, folder, max_shard_size="30KB" if name == "sharded" else "5GB")


def make_gguf(folder: Path) -> None:
    """A file with a tokenizer of a kind that is not rebuilt, so that it stays small."""
    folder.mkdir()
    model = ternary_model(vocab_size=2048, hidden_size=256, intermediate_size=256)
    model.save_pretrained(folder / "source")
    packed = AutoModelForCausalLM.from_pretrained(
        folder / "source", quantization_config=BitLabConfig(mode="infer")
    )
    export_gguf(packed, folder / "whole.gguf", tokenizer=AutoTokenizer.from_pretrained(DEMO))
    reader = gguf.GGUFReader(folder / "whole.gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama.") or key == "general.file_type":
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for item in reader.tensors:
        writer.add_tensor(item.name, np.array(item.data), raw_dtype=item.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.rmtree(folder / "source")
    (folder / "whole.gguf").unlink()


@torch.no_grad()
def outputs(name: str, folder: Path) -> tuple[Tensor, bool]:
    model, said = LOADERS[name](folder)
    logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits.float().clone(), said


@dataclass(frozen=True)
class Sources:
    """Whole models of every kind, and what each gives."""

    folder: Path
    expected: dict[str, Tensor]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    expected = {}
    for name in LOADERS:
        make(name, folder / name)
        copy = folder / "copy"
        shutil.copytree(folder / name, copy)
        expected[name], said = outputs(name, copy)
        assert not said
        shutil.rmtree(copy)
    return Sources(folder, expected)


def mutate(name: str, folder: Path, rng: random.Random) -> Mutation:
    return rng.choice(GGUF if name == "gguf" else SAFETENSORS)(folder, rng)


def judge(sources: Sources, seed: int, case: int, scratch: Path) -> tuple[str, str]:
    """Runs one case; returns ``"fine"`` or what is wrong, and what was done."""
    rng = random.Random(f"{seed} {case}")
    name = rng.choice(list(LOADERS))
    folder = scratch / f"case-{case}"
    shutil.copytree(sources.folder / name, folder)
    mutation = mutate(name, folder, rng)
    what = f"case {case}, {name}: {mutation.what}"
    try:
        found, said = outputs(name, folder)
    except BitLabError:
        return "fine", what
    except Exception as error:
        return ("unclear" if is_ours(error) else "fine"), f"{what}: {told(error)}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    expected = sources.expected[name]
    same = found.shape == expected.shape and bool(
        torch.equal(found.view(torch.int32), expected.view(torch.int32))
    )
    return ("fine" if same or said or mutation.legal else "silent"), what


def told(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error!s:.200} ({frame.filename}:{frame.lineno})"


def is_ours(error: BaseException) -> bool:
    """Tells whether an error without a class of ours came from our code, not from transformers'."""
    places = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = [place.startswith(OURS) for place in places if "/transformers/" in place or
            "/huggingface_hub/" in place or place.startswith(OURS)]  # fmt: skip
    return bool(ours) and ours[-1]


def work(connection: Connection, sources: Sources, seed: int, cases: range, scratch: Path) -> None:
    """What a worker does: cases one after the other, each told of before and after."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    sys.stdin = open(os.devnull)  # noqa: SIM115
    for case in cases:
        connection.send((case, None))
        connection.send((case, judge(sources, seed, case, scratch)))
    connection.close()


def run(sources: Sources, seed: int, count: int, scratch: Path) -> Iterator[tuple[str, str]]:
    """Runs cases in worker processes; where one dies or waits without end, another goes on."""
    context = multiprocessing.get_context("fork")
    case = 0
    while case < count:
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(
            target=work, args=(theirs, sources, seed, range(case, count), scratch)
        )
        worker.start()
        theirs.close()
        while case < count:
            if not ours.poll(PATIENCE):
                yield "hang", f"case {case}"
                break
            try:
                case, result = ours.recv()
            except EOFError:
                worker.join(PATIENCE)
                yield "crash", f"case {case}: the process ended with {worker.exitcode}"
                break
            if result is not None:
                yield result
                case += 1
        else:
            worker.join(PATIENCE)
            return
        worker.kill()
        worker.join()
        case += 1


def check(sources: Sources, count: int, scratch: Path) -> None:
    seed = int(os.environ.get("BITLAB_MUTATION_SEED") or secrets.randbits(32))
    print(f"BITLAB_MUTATION_SEED={seed}")
    results = list(run(sources, seed, count, scratch))
    assert len(results) == count
    wrong = [f"{verdict}: {what}" for verdict, what in results if verdict != "fine"]
    assert not wrong, f"BITLAB_MUTATION_SEED={seed}\n" + "\n".join(wrong)


def test_a_few_hundred(sources: Sources, tmp_path: Path) -> None:
    check(sources, 200, tmp_path)


@pytest.mark.ci
def test_thousands(sources: Sources, tmp_path: Path) -> None:
    check(sources, 2000, tmp_path)


def test_every_mutation_changes_a_file(sources: Sources, tmp_path: Path) -> None:
    """The guard of the guard: what is done is done, and nothing else than the copy is touched."""
    before = {p: p.read_bytes() for p in sources.folder.rglob("*") if p.is_file()}
    changed = 0
    for case in range(200):
        rng = random.Random(case)
        name = rng.choice(list(LOADERS))
        folder = tmp_path / str(case)
        shutil.copytree(sources.folder / name, folder)
        mutate(name, folder, rng)
        held = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        whole = {
            p.relative_to(sources.folder / name): content
            for p, content in before.items()
            if p.is_relative_to(sources.folder / name)
        }
        changed += held != whole
    assert changed > 190
    assert before == {p: p.read_bytes() for p in sources.folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("verdict", ["crash", "hang", "silent", "unclear"])
def test_what_it_is_there_to_find(
    sources: Sources, tmp_path: Path, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults put into the loader are found, and the run goes on behind them."""
    module = sys.modules[__name__]

    def broken(name: str, folder: Path) -> tuple[Tensor, bool]:
        if verdict == "crash":
            os.abort()
        if verdict == "hang":
            multiprocessing.Event().wait()
        if verdict == "unclear":
            BitLabConfig.layer_config(None)  # type: ignore[call-arg, arg-type]
        return torch.zeros_like(sources.expected[name]), False

    monkeypatch.setattr(module, "outputs", broken)
    monkeypatch.setattr(module, "mutate", lambda *_given: Mutation("nothing", legal=False))
    monkeypatch.setattr(module, "PATIENCE", 2.0)
    found = [result[0] for result in run(sources, 1, 3, tmp_path)]
    assert found == [verdict] * 3


def test_the_seed_repeats_a_case(sources: Sources, tmp_path: Path) -> None:
    first, second = (judge(sources, 7, 11, tmp_path) for _ in range(2))
    assert first == second
    assert json.dumps(first)
