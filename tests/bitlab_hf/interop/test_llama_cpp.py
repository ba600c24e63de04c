"""llama.cpp itself on an exported model: the demo's, ternary and shortly trained.

Every weight in the file is one of ours, its scale rounded to float16. llama.cpp quantizes
activations by blocks of 256 where BitLab does by token: a torch model that computes with such
blocks is closer to llama.cpp, so they are most of the difference. What the rest comes from is not
known.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitcore import unpack_ternary
from bitlab_hf import BitLabConfig, convert_ternary, deploy, export_gguf, load_gguf
from bitlab_hf.demo.corpus import source_files
from bitlab_hf.interop import q2_0
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.interop.test_gguf import DEMO, NAMES, read, rotated

pytestmark = pytest.mark.ci
# Nats between two tokens that either program may take: rounding of activations moves logits so far.
NEARLY = 0.25
LENGTH, COUNT, STEPS = 250, 1000, 16


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def trained(tokenizer: Any, **scheme: Any) -> Any:
    """The demo's model after 16,384 tokens of quantization-aware training, in float32."""
    torch.manual_seed(0)
    latent: Any = AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, quantization_config=BitLabConfig(**scheme)
    ).train()
    text = "".join(file.text for file in source_files("train"))
    ids = torch.tensor(tokenizer(text[:400_000])["input_ids"][: STEPS * 1024])
    optimizer = torch.optim.AdamW(latent.parameters(), lr=1e-3, betas=(0.9, 0.95))
    batches = ids.view(-1, 2, 512)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / len(batches))
        latent(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(latent.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # The file's embedding is as exact as the model's.
    embedding = latent.get_input_embeddings().weight
    embedding.data = embedding.data.bfloat16().float()
    return deploy(latent.eval())


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return trained(tokenizer)


@pytest.fixture(scope="module")
def file(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "demo.gguf"
    export_gguf(model, path, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def heldout(tokenizer: Any) -> list[int]:
    text = "".join(item.text for item in list(source_files("heldout"))[:3])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"][:COUNT])


@pytest.fixture(scope="module")
def llama(file: Path) -> Any:
    return running(file)


def running(file: Path) -> Any:
    from llama_cpp import GGML_TYPE_F32, Llama

    return Llama(
        str(file), n_ctx=LENGTH + 64, logits_all=True, verbose=False, n_threads=2,
        type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
    )  # fmt: skip


@torch.no_grad()
def ours(model: Any, ids: list[int]) -> Tensor:
    blocks = torch.tensor(ids).view(-1, LENGTH)
    result: Tensor = torch.cat([model(input_ids=block[None]).logits[0] for block in blocks])
    return result.float().log_softmax(-1)


def theirs(llama: Any, ids: list[int]) -> Tensor:
    parts = []
    for start in range(0, len(ids), LENGTH):
        llama.reset()
        llama.eval(ids[start : start + LENGTH])
        parts.append(torch.tensor(llama.scores[:LENGTH], dtype=torch.float32))
    return torch.cat(parts).log_softmax(-1)


def divergence(expected: Tensor, found: Tensor) -> float:
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def agreement(expected: Tensor, found: Tensor) -> float:
    return float((expected.argmax(-1) == found.argmax(-1)).double().mean())


def test_codes_and_scales(model: Any, file: Path) -> None:
    tensors, _ = read(file)
    for found in quantized_layers(model):
        _, _, block, *parts = found.names[0].split(".")
        layer = found.module
        codes = unpack_ternary(layer.qweight, layer.out_features).float()
        expected = codes * layer.qweight_scale.half().float()
        heads = {"q_proj": 4, "k_proj": 2}.get(parts[-1])
        expected = expected if heads is None else rotated(expected, heads)
        assert torch.equal(tensors[f"blk.{block}.{NAMES['.'.join(parts)]}.weight"], expected)


def test_logits_and_text(
    model: Any, llama: Any, tokenizer: Any, heldout: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert llama.tokenize(tokenizer.decode(heldout).encode(), add_bos=False) == heldout
    expected, found = ours(model, heldout), theirs(llama, heldout)
    same, nats = agreement(expected, found), divergence(expected, found)
    prompt = tokenizer("def main():", return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0].tolist()
    start = prompt["input_ids"][0].tolist()
    llama.reset()
    other = list(start)
    for token in llama.generate(list(start), temp=0.0, repeat_penalty=1.0):
        other.append(token)
        if len(other) == len(tokens):
            break
    with capsys.disabled():
        print(f"\nsame most likely token {same:.1%}, KL {nats:.5f} nats, over {COUNT} tokens")
        print(f"BitLab:    {tokenizer.decode(tokens)!r}\nllama.cpp: {tokenizer.decode(other)!r}")
    assert same >= 0.97
    assert nats <= 0.01
    # The text may part, but only where two tokens are nearly as likely.
    parted = next(
        (at for at, pair in enumerate(zip(tokens, other, strict=True)) if len({*pair}) > 1), 0
    )
    if parted:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[:parted]])).logits[0, -1].float()
        gap = (logits[tokens[parted]] - logits[other[parted]]).item()
        assert 0 <= gap <= NEARLY, f"parted at token {parted} by {gap:.3f} nats"


def _blocks_of_256(x: Tensor) -> Tensor:
    """What llama.cpp makes of activations, as floats: 127 / the value of the largest magnitude."""
    blocks = x.unflatten(-1, (-1, 256))
    most = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    factor = torch.where(most == 0, 0.0, -127.0 / most)
    codes = (blocks * factor).round().clamp(max=127)
    return torch.where(factor == 0, 0.0, codes / factor).flatten(-2)


class _Blocked(nn.Module):
    def __init__(self, weight: Tensor, quantize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.quantize = weight, quantize

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantize(x), self.weight)


def test_blocks_are_most_of_the_difference(
    model: Any, llama: Any, heldout: list[int], tmp_path: Path
) -> None:
    """The same weights over blocks of activations in torch: nearer to llama.cpp than BitLab is."""
    found = theirs(llama, heldout)
    before = divergence(ours(model, heldout), found)
    for layer in quantized_layers(model):
        module = layer.module
        codes = unpack_ternary(module.qweight, module.out_features).float()
        weight = codes * module.qweight_scale.half().float()
        for name in layer.names:
            model.set_submodule(name, _Blocked(weight, _blocks_of_256))
    blocked = ours(model, heldout)
    assert divergence(blocked, found) < 0.5 * before
    assert agreement(blocked, found) >= 0.98


def test_the_file_is_of_one_ternary_type(file: Path) -> None:
    kinds = {item.name: item.tensor_type for item in gguf.GGUFReader(file).tensors}
    layers = [kind for name, kind in kinds.items() if name.endswith(("_q.weight", "_up.weight"))]
    assert set(layers) == {gguf.GGMLQuantizationType.TQ2_0}
    assert len(layers) == 12
    assert np.all([kind.name in ("TQ2_0", "F32") for kind in kinds.values()])


def said(name: str, expected: Tensor, found: Tensor) -> str:
    same, nats = agreement(expected, found), divergence(expected, found)
    return f"{name}: same most likely token {same:.2%}, KL {nats:.2e} nats"


@pytest.mark.parametrize("shape", [(1, 64), (33, 576), (5, 11008)])
def test_q2_0_is_what_ggml_reads(shape: tuple[int, int]) -> None:
    """The type's number and sizes, and every value of it, by ggml's own code."""
    import llama_cpp

    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib/libggml-base.so"))
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    assert ggml.ggml_type_name(q2_0.NUMBER) == b"q2_0"
    assert ggml.ggml_blck_size(q2_0.NUMBER) == q2_0.BLOCK
    assert ggml.ggml_type_size(q2_0.NUMBER) == q2_0.SIZE
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    scale = torch.rand(shape[0], shape[1] // 64) + 1e-3
    data = q2_0.encode(codes, scale).contiguous()
    # The code for +2, which only others write, too.
    data[0, 2] = 0b11_01_00_10
    found = torch.full(shape, torch.nan)
    read: Any = ggml.dequantize_row_q2_0
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    read.restype = None
    read(data.data_ptr(), found.data_ptr(), found.numel())
    assert torch.equal(found, q2_0.decode(data.numpy()))
    first = scale[0, 0].half().float()
    assert torch.equal(found[0, :4] / first, torch.tensor([1.0, -1.0, 0.0, 2.0]))


def test_groups_of_64(
    tokenizer: Any, heldout: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Q2_0: what rounding scales to float16 changes, and what llama.cpp makes of the file."""
    model = trained(tokenizer, weight_granularity="per_group", group_size=64)
    change = export_gguf(model, tmp_path / "groups.gguf", tokenizer=tokenizer)
    expected = ours(model, heldout)
    again = ours(load_gguf(tmp_path / "groups.gguf", dtype=torch.float32), heldout)
    found = theirs(running(tmp_path / "groups.gguf"), heldout)
    with capsys.disabled():
        print(f"\nscales rounded by up to {change:.2g} of themselves")
        print(said("rounded", expected, again), said("llama.cpp", expected, found), sep="\n")
    assert change <= 2**-11
    assert divergence(expected, again) <= 1e-3
    assert divergence(expected, found) <= 0.01
    assert agreement(expected, found) >= 0.97


def test_what_multipliers_of_7_bits_change(
    tokenizer: Any, heldout: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of floats that are ternary in groups of 64: less than computing in bfloat16 does."""
    scheme = {"weight_granularity": "per_group", "group_size": 64, "activation_dtype": "float32"}
    model = trained(tokenizer, **scheme, group_scale_dtype="float32")
    model.dequantize().save_pretrained(tmp_path / "floats")
    found = {}
    for dtype in ("float32", "uint8"):
        folder = tmp_path / dtype
        report = convert_ternary(tmp_path / "floats", folder, group_scale_dtype=dtype)
        packed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found[dtype] = ours(packed, heldout)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    expected, rounded, other = found["float32"], found["uint8"], ours(half, heldout)
    with capsys.disabled():
        print(f"\nscales rounded by up to {report.scale_change:.2g} of themselves")
        print(said("uint8", expected, rounded), said("bfloat16", expected, other), sep="\n")
    assert 0 < report.scale_change < 0.05
    assert divergence(expected, rounded) < 0.5 * divergence(expected, other)
    assert agreement(expected, rounded) >= 0.99
