"""compile_decoding: the bits of eager decoding, one library for all layers, nothing lost."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.cache_utils import StaticLayer

import bitlab_hf.model.decoding as decoding
import bitlab_hf.model.decoding_step as decoding_step
from bitcore.errors import ArgumentError, BackendError, LifecycleError
from bitlab_hf import BitLabConfig, compile_decoding, deploy, replace_linear
from bitlab_hf.model.decoding_inputs import (
    FittedStep,
    Inputs,
    Surroundings,
    UnfitError,
    _describe,
    _is_plain,
    weights_of,
)

VOCABULARY, TOKENS = 97, 12


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
# Names of transformers' configurations, with what sizes do not say.
OTHERS: dict[str, dict[str, Any]] = {
    "bitnet": {},
    "gemma": {"head_dim": 32},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    },
}  # fmt: skip


def make(kind: str = "llama", int8_layers: Sequence[str] = (), **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    replace_linear(model, BitLabConfig(head="int8", int8_layers=list(int8_layers)))
    return deploy(model)


def scores(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        do_sample=False,
        max_new_tokens=TOKENS,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    stacked: Tensor = torch.stack(found.scores)
    return stacked


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCABULARY, (1, n), generator=generator) for n in (1, 7, 64, 100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITLAB_CACHE", str(folder))
    return folder / "decoding"


def compiled_layers(model: Any) -> int:
    forwards = [layer.forward for layer in model.model.layers]
    return sum(isinstance(one, decoding._Decoder) and one._is_ready for one in forwards)


@pytest.mark.slow
def test_a_layer_with_int8_among_ternary_ones_has_a_library_of_its_own(cache: Path) -> None:
    model = make(int8_layers=["layers.1.mlp"])
    wanted = scores(model, prompts()[1])
    before = len(list(cache.glob("*.pt2")))
    assert compile_decoding(model) == 2
    assert torch.equal(scores(model, prompts()[1], cache_implementation="static"), wanted)
    assert compiled_layers(model) == 2
    assert len(list(cache.glob("*.pt2"))) > before


@pytest.mark.slow
def test_exact_gives_the_bits_of_a_dynamic_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLAB_CACHE", str(tmp_path))
    model = make()
    wanted = [scores(model, ids) for ids in prompts()]
    assert compile_decoding(model) == 2
    for ids, one in zip(prompts(), wanted, strict=True):
        assert torch.equal(scores(model, ids, cache_implementation="static"), one)
        assert compiled_layers(model) == 2
    # One for both layers, and for any length.
    assert len(list(tmp_path.glob("decoding/*.pt2"))) == 1
    # Without a static cache everything is as before.
    assert torch.equal(scores(model, prompts()[1]), wanted[1])
    assert compiled_layers(model) == 0


@pytest.mark.ci
@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_exact_for_other_architectures(kind: str) -> None:
    """Norms of queries and keys, scaled embeddings, fused projections, experts."""
    model = make(kind, **OTHERS[kind])
    wanted = [scores(model, ids) for ids in prompts()]
    compile_decoding(model)
    for ids, one in zip(prompts(), wanted, strict=True):
        assert torch.equal(scores(model, ids, cache_implementation="static"), one)
        assert compiled_layers(model) == 2


@pytest.mark.ci
def test_another_process_compiles_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would export first. The library is that of the test above."""
    ids = prompts()[2]
    first = make()
    compile_decoding(first)
    wanted = scores(first, ids, cache_implementation="static")

    def export(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("compiled anew")

    monkeypatch.setattr(decoding_step, "_export", export)
    second = make()
    compile_decoding(second)
    assert torch.equal(scores(second, ids, cache_implementation="static"), wanted)
    assert compiled_layers(second) == 2


@pytest.mark.ci
def test_fused_is_equal_to_rounding_and_takes_padding() -> None:
    model = make()
    ids = torch.randint(2, VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wanted = scores(model, ids, mask)
    compile_decoding(model, exact=False)
    got = scores(model, ids, mask, cache_implementation="static")
    assert compiled_layers(model) == 2
    # The first scores are the prompt's, the next the first step's.
    off = (got[1].float() - wanted[1].float()).norm() / wanted[1].float().norm()
    assert 0 < off < 0.02
    # Padding that is not looked at: other tokens in its place change nothing.
    ids[0, :4] = 5
    assert torch.equal(scores(model, ids, mask, cache_implementation="static"), got)


@pytest.mark.ci
def test_exact_leaves_padded_steps_alone() -> None:
    model = make()
    ids, mask = torch.randint(2, VOCABULARY, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    wanted = scores(model, ids, mask, cache_implementation="static")
    compile_decoding(model)
    assert torch.equal(scores(model, ids, mask, cache_implementation="static"), wanted)
    assert compiled_layers(model) == 0


@pytest.mark.ci
def test_new_weights_are_used(cache: Path) -> None:
    """The libraries hold none: a layer whose tensors are exchanged or written to follows."""
    model, other = make(), make(rms_norm_eps=1e-6)
    ids = prompts()[1]
    compile_decoding(model)
    scores(model, ids, cache_implementation="static")
    torch.manual_seed(1)
    for one in (model, other):
        torch.manual_seed(1)
        for layer in one.model.layers:
            qweight = layer.mlp.up_proj.qweight
            layer.mlp.up_proj.qweight = torch.nn.Parameter(
                qweight[torch.randperm(len(qweight))], requires_grad=False
            )
            layer.self_attn.q_proj.qweight.copy_(layer.self_attn.q_proj.qweight.flip(0))
    assert torch.equal(scores(model, ids, cache_implementation="static"), scores(other, ids))
    assert compiled_layers(model) == 2


@pytest.mark.ci
def test_a_step_that_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = make(), prompts()[1]
    wanted = scores(model, ids, cache_implementation="static")
    monkeypatch.setattr(decoding, "_TOLERANCE", -1.0)
    compile_decoding(model)
    with caplog.at_level(logging.WARNING, "bitlab"):
        got = scores(model, ids, cache_implementation="static")
    assert torch.equal(got, wanted)
    assert compiled_layers(model) == 0
    # Said once for all layers.
    assert [record.getMessage() for record in caplog.records] == [
        "bitlab: layer 0 (LlamaDecoderLayer) is not compiled: its compiled step differs"
    ]


def test_a_layer_that_cannot_be_exported_runs_as_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def export(*args: Any, **kwargs: Any) -> None:
        raise UnfitError("torch.export cannot take it: no")

    monkeypatch.setenv("BITLAB_CACHE", "off")
    monkeypatch.setattr(decoding_step, "_export", export)
    model, ids = make(), prompts()[1]
    wanted = scores(model, ids, cache_implementation="static")
    compile_decoding(model)
    with caplog.at_level(logging.WARNING, "bitlab"):
        assert torch.equal(scores(model, ids, cache_implementation="static"), wanted)
    assert "torch.export cannot take it: no" in caplog.text


@pytest.mark.ci
def test_a_damaged_library_is_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(exist_ok=True)
    damaged = cache / "key.pt2"
    damaged.write_bytes(b"no library")

    def export(*args: Any, **kwargs: Any) -> None:
        raise UnfitError("asked")

    monkeypatch.setattr(decoding_step, "_export", export)
    surroundings: Any = type("Surroundings", (), {"exact": True})
    with pytest.raises(UnfitError, match="asked"):
        decoding_step.load_step("key", *[None] * 5, surroundings)  # type: ignore[arg-type]
    assert not damaged.exists()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setenv("BITLAB_CACHE", "off")
    monkeypatch.setattr(decoding_step, "_export", lambda *args: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    model = make()
    compile_decoding(model)
    with pytest.raises(BackendError, match=r"got: No working C\+\+ compiler found\nA C\+\+"):
        scores(model, prompts()[1], cache_implementation="static")


def test_what_is_refused() -> None:
    model = make()
    model.set_attn_implementation("eager")
    with pytest.raises(ArgumentError, match="attn_implementation must be 'sdpa', got 'eager'"):
        compile_decoding(model)
    latent = LlamaForCausalLM(model.config)
    with pytest.raises(LifecycleError, match="must be deployed"):
        compile_decoding(latent)
    replace_linear(latent, BitLabConfig())
    with pytest.raises(LifecycleError, match="must be deployed"):
        compile_decoding(latent)


def test_a_copy_is_not_compiled_and_twice_is_once() -> None:
    model = make()
    compile_decoding(model)
    compile_decoding(model, exact=False)
    layer = model.model.layers[0]
    assert not isinstance(layer.forward.own, decoding._Decoder)
    copied = copy.deepcopy(model)
    own = copied.model.layers[0].forward
    assert not isinstance(own, decoding._Decoder)
    assert own.__self__ is copied.model.layers[0]
    assert torch.equal(scores(copied, prompts()[1]), scores(model, prompts()[1]))


def test_what_a_step_depends_on() -> None:
    """Fields of modules, hooks, dtypes: each is another step, or none."""
    model, held = make(), StaticLayer(64)
    held.lazy_initialization(*[torch.zeros(1, 2, 1, 32, dtype=torch.bfloat16)] * 2)
    layer, hidden = model.model.layers[0], torch.zeros(1, 1, 128, dtype=torch.bfloat16)
    kwargs: dict[str, Any] = {
        "attention_mask": torch.ones(1, 1, 1, 64, dtype=torch.bool), "use_cache": True,
    }  # fmt: skip
    inputs = Inputs((), kwargs, 5, exact=True)
    surroundings = Surroundings(model.config, exact=True)

    def key() -> str:
        return FittedStep(layer, hidden, inputs).describe(layer, inputs, held, surroundings)

    keys = [key(), key()]
    assert keys[0] == keys[1]
    layer.self_attn.layer_idx = 7
    assert key() == keys[0]
    fitted = FittedStep(layer, hidden, inputs)
    assert fitted.fits(layer, hidden, inputs, same_weights=False)
    for change in (
        lambda: setattr(layer.self_attn, "scaling", 0.5),
        lambda: setattr(layer.self_attn, "factors", {"default": 1.0}),
        lambda: layer.self_attn.factors.update(default=2.0),
        lambda: layer.mlp.down_proj.register_parameter("bias", torch.nn.Parameter(torch.ones(128))),
    ):
        change()
        keys.append(key())
    assert len(set(keys)) == len(keys) - 1
    assert not fitted.fits(layer, hidden, inputs, same_weights=False)
    fitted = FittedStep(layer, hidden, inputs)
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.float()
    assert not fitted.fits(layer, hidden, inputs, same_weights=False)
    assert key() not in keys
    fitted = FittedStep(layer, hidden, inputs)
    layer.mlp.register_forward_hook(lambda *_: None)
    assert not fitted.fits(layer, hidden, inputs, same_weights=False)
    with pytest.raises(UnfitError, match="its modules have hooks"):
        key()
    strange = Inputs((), {**kwargs, "step": 3}, 5, exact=True)
    refused = FittedStep(layer, hidden, strange)
    with pytest.raises(UnfitError, match=r"its arguments \['step'\] are no tensors"):
        refused.describe(layer, strange, held, surroundings)
    other = Inputs((), {**kwargs, "use_cache": False}, 5, exact=True)
    assert not fitted.fits(layer, hidden, other, same_weights=True)
    assert not fitted.fits(layer, hidden.expand(2, 1, 128), inputs, same_weights=True)


def test_layers_whose_experts_differ_have_steps_of_their_own() -> None:
    config = AutoConfig.for_model("qwen3_moe", **SIZES, **OTHERS["qwen3_moe"])
    model = AutoModelForCausalLM.from_config(config)
    overrides = {"model.layers.1.mlp.experts": {"activation_dtype": "float32"}}
    first, second = deploy(replace_linear(model, BitLabConfig(overrides=overrides))).model.layers
    shapes = [{name: one.shape for name, one in weights_of(o).items()} for o in (first, second)]
    assert shapes[0] == shapes[1]
    assert _describe(first) != _describe(second)


@pytest.mark.parametrize("kind", ["llama", *OTHERS])
def test_which_fields_a_step_does_not_depend_on(kind: str) -> None:
    """What is neither plain nor a tensor or module is left out of the key, so it may say nothing
    that the model's configuration and the classes do not.
    """
    layers = make(kind, **OTHERS.get(kind, {})).model.layers
    fields = {
        key
        for module in layers.modules()
        for key, value in vars(module).items()
        if not _is_plain(value)
    }
    tables = {"_parameters", "_buffers", "_modules"}
    assert fields - tables <= {"config", "_cache", "act"}


def test_how_much_of_the_cache_is_read() -> None:
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    for tokens, exact, read in ((5, True, 5), (5, False, 64), (64, False, 64), (130, False, 192),
                                (199, False, 200)):  # fmt: skip
        assert Inputs((), {"attention_mask": mask}, tokens, exact).mask.shape[-1] == read
