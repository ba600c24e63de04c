"""Sums that layers' outputs are added to: found by trying, and used."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from bitlab_hf import BitLabConfig, replace_linear
from bitlab_hf.fit import calibrate as module
from bitlab_hf.fit.streams import find_units
from bitlab_hf.fit.sums import SumFinder
from bitlab_hf.fit.taps import Tap, tapped
from bitlab_hf.model.tree import decoder_layers

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
KEYS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
# Model, dtype, and of its first block the layers that are added to, with the place of the sum.
MODELS: dict[str, tuple[Any, torch.dtype, dict[str, str]]] = {
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **KEYS)),
        torch.float32,
        {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "output"},
    ),
    "llama in bfloat16": (
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **KEYS)),
        torch.bfloat16,
        {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": "output"},
    ),
    # What is added there has gone through a norm of its own.
    "gemma3": (
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **KEYS)),
        torch.float32,
        {},
    ),
    # Attention and MLP are added side by side.
    "gpt-neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
        torch.float32,
        {"attention.dense": "output", "mlp.dense_4h_to_h": "output"},
    ),
    # The sum goes into a norm.
    "bert": (
        lambda: BertModel(BertConfig(**SIZES)),
        torch.float32,
        {
            "attention.output.dense": "attention.output.LayerNorm",
            "output.dense": "output.LayerNorm",
        },
    ),
    # What experts give for tokens in one row is weighted and added up, then added to the stream.
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **KEYS, num_local_experts=4)),
        torch.float32,
        {"self_attn.o_proj": "post_attention_layernorm", "mlp.experts": "output"},
    ),
}


def tokens(count: int = 4) -> Tensor:
    return torch.randint(0, 128, (count, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_places_are_found(name: str) -> None:
    make, dtype, expected = MODELS[name]
    torch.manual_seed(0)
    model = replace_linear(make().to(dtype))
    with tapped(model) as (taps, streams):
        units = find_units(model, decoder_layers(model), None, [tokens()], taps, streams)
        finder = SumFinder(streams)
        for number, (unit, batches) in enumerate(units[:2]):
            if number:
                batches[0].original = batches[0].ternary = units[0][0].run(units[0][1][0], True)
            originals = unit.originals(batches, finder)
            places = originals.places
            names: dict[nn.Module | None, str] = {
                inner: title for title, inner in unit.module.named_modules()
            }
            names[None] = "output"
            assert {names[tap.module]: names[place] for tap, place in places.items()} == expected
            # No memory is taken by inputs that the solver does not ask for.
            first = {group[0] for group in originals.groups}
            added = {tap for tap in places if isinstance(tap, Tap)}
            assert originals.inputs.keys() == first - added


@torch.no_grad()
def test_what_all_layers_read_is_not_kept() -> None:
    """In the pass through the whole model, whose inputs are looked at: one layer's at a time."""
    model = replace_linear(LlamaForCausalLM(LlamaConfig(**SIZES, **KEYS)))
    held: list[int] = []
    alive: list[weakref.ref[Tensor]] = []
    with tapped(model) as (taps, streams):
        begin = streams.begin

        def count(tap: Any, x: Tensor) -> None:
            begin(tap, x)
            alive.append(weakref.ref(x))
            held.append(sum(one() is not None for one in alive))

        streams.begin = count  # type: ignore[method-assign]
        units = find_units(model, decoder_layers(model), None, [tokens()], taps, streams)
        assert not streams.calls
        assert streams.check is None
    # Queries, keys and values read one tensor, gate and up another.
    assert len(held) == 14 == sum(len(unit.taps) for unit, _ in units)
    assert max(held) <= 4


@pytest.mark.parametrize("activation", ["int8", "float32"])
def test_what_stands_beside_is_taken_back(monkeypatch: pytest.MonkeyPatch, activation: str) -> None:
    """The stream of a whole model is nearer to the original's with the sums than without."""

    def distance() -> float:
        torch.manual_seed(0)
        original = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 4}, **KEYS)).eval()
        with torch.no_grad():
            for parameter in original.model.layers.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5)
        ids = tokens(64)
        with torch.no_grad():
            wanted = original.model(ids).last_hidden_state
        model = replace_linear(original, BitLabConfig(activation_dtype=activation))
        module.calibrate(model, ids)
        with torch.no_grad():
            return float((model.eval().model(ids).last_hidden_state - wanted).square().mean())

    with_sums = distance()
    monkeypatch.setattr(SumFinder, "find", lambda *_: {})
    assert with_sums < 0.9 * distance()
