"""Every architecture in a GGUF file: there and back, and what llama.cpp makes of it in CI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import BitLabConfig, deploy, export_gguf, load_gguf, replace_linear
from bitlab_hf.interop.gguf_architectures import ARCHITECTURES
from bitlab_hf.interop.gguf_config import read_config
from bitlab_hf.interop.gguf_file import read_gguf
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.interop.test_gguf import DEMO, SIZES

# Eight layers: Gemma 3 and SmolLM3 have periods of six and four.
COMMON = {**SIZES, "num_hidden_layers": 8, "max_position_embeddings": 256, "pad_token_id": 0}
MIXED, ONE = {"num_hidden_layers": 3, "num_experts_per_tok": 2}, {"num_experts_per_tok": 1}
# The configuration's class, its fields, and a change of them that llama.cpp must not confuse.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", {}, {"rope_parameters": {"rope_theta": 1e6}}),
    "MistralForCausalLM": ("MistralConfig", {}, {"sliding_window": 16}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}, {"rope_parameters": {"rope_theta": 100.0}}),
    "Qwen3ForCausalLM": (
        "Qwen3Config", {"head_dim": 128}, {"rope_parameters": {"rope_theta": 100.0}},
    ),
    "BitNetForCausalLM": (
        "BitNetConfig", {"hidden_act": "silu", "tie_word_embeddings": True}, {"rms_norm_eps": 0.5},
    ),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 32},
        {"sliding_window": 16},
    ),
    "Phi3ForCausalLM": (
        "Phi3Config",
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ),
    "GraniteForCausalLM": (
        "GraniteConfig",
        {"attention_multiplier": 0.1, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
         "logits_scaling": 4.0},
        {"attention_multiplier": 0.2},
    ),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {}, {"no_rope_layers": [1] * 8}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4, **MIXED}, ONE),
    "Qwen2MoeForCausalLM": (
        "Qwen2MoeConfig",
        {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512, "num_experts": 6,
         **MIXED},
        {"norm_topk_prob": True},
    ),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {"head_dim": 64, "moe_intermediate_size": 256, "num_experts": 6, "norm_topk_prob": True,
         **MIXED},
        {"norm_topk_prob": False},
    ),
    "OlmoeForCausalLM": (
        "OlmoeConfig", {"num_experts": 4, "num_key_value_heads": 4, **MIXED}, ONE,
    ),
    "GraniteMoeForCausalLM": (
        "GraniteMoeConfig",
        {"attention_multiplier": 0.1, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
         "logits_scaling": 4.0, "num_local_experts": 4, **MIXED},
        ONE,
    ),
}  # fmt: skip
MIXTURES = [name for name, (_, fields, _) in KINDS.items() if "num_experts_per_tok" in fields]
LENGTH = 96
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
CHANGED: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    # A share means nothing to this class.
    ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    (
        "Gemma3ForCausalLM",
        {
            "final_logit_softcapping": 0.7,
            "sliding_window": 24,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
]


def latent(name: str, **changes: Any) -> Any:
    config_class, fields, _ = KINDS[name]
    window = {} if name != "MistralForCausalLM" else {"sliding_window": None}
    config = getattr(transformers, config_class)(**{**COMMON, **window, **fields, **changes})
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def build(name: str, **changes: Any) -> Any:
    """A deployed model whose weights bfloat16 holds exactly, with norms and biases of all kinds."""
    model = latent(name, **changes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" in key or "lm_head" in key:
                parameter.copy_(parameter.bfloat16().float())
    replace_linear(model, BitLabConfig(activation_dtype="float32"))
    deploy(model)
    for found in quantized_layers(model):
        found.module.qweight_scale = torch.full_like(found.module.qweight_scale, 2.0**-4)
    for experts in expert_modules(model):
        for name, stack in experts.module.stacks.items():
            scale = getattr(experts.module, f"{name}_qweight_scale")
            # Another for each expert, and for gate and up.
            each = torch.arange(stack.experts * stack.parts).view(stack.experts, stack.parts)
            scale.view(*each.shape, -1).copy_(2.0 ** -(3 + each % 3).unsqueeze(2))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 2000, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    found: Tensor = model(input_ids=ids).logits[0].float()
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def test_all_are_here() -> None:
    assert KINDS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("qtype", ["Q2_0", "BF16"])
@pytest.mark.parametrize("name", KINDS)
def test_there_and_back(name: str, qtype: str, tokenizer: Any, tmp_path: Path) -> None:
    model = build(name)
    assert export_gguf(model, tmp_path / "model.gguf", qtype, tokenizer=tokenizer) == 0
    again = load_gguf(tmp_path / "model.gguf", dtype=torch.float32, activation_dtype="float32")
    # llama.cpp has one architecture for both.
    assert type(again).__name__ == name.replace("Mistral", "Llama")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-6)
    for ours, theirs in zip(quantized_layers(model), quantized_layers(again), strict=True):
        assert torch.equal(ours.module.packed()[0], theirs.module.packed()[0])
    same_experts(model, again)


class Asked(dict[str, Any]):
    """A file's fields, which note what is asked for."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in KINDS), *CHANGED])
def test_all_that_is_written_is_read(
    name: str, changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    """No field of the file is left out, and those of the configuration come back."""
    model = build(name, **changes)
    export_gguf(model, tmp_path / "model.gguf", "BF16", tokenizer=tokenizer)
    file = read_gguf(tmp_path / "model.gguf")
    fields = Asked(file.fields)
    shapes = {key: item.shape for key, item in file.tensors.items()}
    found = read_config(fields, shapes, None).to_dict()
    own = {key for key in fields if key.startswith(f"{ARCHITECTURES[name].name}.")}
    # The embedding shows it.
    assert own - fields.names == {f"{ARCHITECTURES[name].name}.vocab_size"}
    expected = model.config.to_dict()
    # Of the class; of the tokenizer; what it may leave open; what scales nothing.
    left = ("architectures", "model_type", "quantization_config", "pad_token_id", "head_dim",
            "original_max_position_embeddings")  # fmt: skip
    rope, held = found.pop("rope_parameters"), expected["rope_parameters"]
    assert {key: expected.get(key, value) for key, value in found.items() if key not in left} == {
        key: value for key, value in found.items() if key not in left
    }
    parts = [(rope[key], held[key]) for key in rope] if "full_attention" in rope else [(rope, held)]
    for theirs, ours in parts:
        assert theirs.items() <= {"rope_type": "default", **ours}.items()


@pytest.mark.parametrize(("name", "changes"), CHANGED)
def test_changed_models_there_and_back(
    name: str, changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = build(name, **changes)
    export_gguf(model, tmp_path / "model.gguf", "BF16", tokenizer=tokenizer)
    again = load_gguf(tmp_path / "model.gguf", dtype=torch.float32, activation_dtype="float32")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("final_logit_softcapping", 30.0, r"final_logit_softcapping must be 0\.0, got 30\.0"),
        ("attn_logit_softcapping", 50.0, r"attn_logit_softcapping must be 0\.0, got 50\.0"),
        ("attention.scale", 0.5, r"attention\.scale must be 0\.0, got 0\.5"),
        ("embedding_scale", 2.0, r"embedding_scale must be 1\.0, got 2\.0"),
        ("residual_scale", 2.0, r"residual_scale must be 1\.0, got 2\.0"),
        ("logit_scale", 2.0, r"logit_scale must be 1\.0, got 2\.0"),
        ("rope.scale_linear", 2.0, r"rope\.scale_linear must be 1\.0, got 2\.0"),
        ("rope.scaling.attn_factor", 2.0, r"attn_factor must be 1\.0, got 2\.0"),
    ],
)
def test_what_the_class_does_not_compute(
    field: str, value: float, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    export_gguf(build("LlamaForCausalLM"), tmp_path / "model.gguf", tokenizer=tokenizer)
    file = read_gguf(tmp_path / "model.gguf")
    shapes = {key: item.shape for key, item in file.tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        read_config({**file.fields, f"llama.{field}": value}, shapes, None)


def test_a_factor_alone_is_linear(tokenizer: Any, tmp_path: Path) -> None:
    export_gguf(build("LlamaForCausalLM"), tmp_path / "model.gguf", tokenizer=tokenizer)
    file = read_gguf(tmp_path / "model.gguf")
    shapes = {key: item.shape for key, item in file.tensors.items()}
    found = read_config({**file.fields, "llama.rope.scaling.factor": 4.0}, shapes, None)
    assert found.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def same_experts(model: Any, again: Any) -> None:
    """Codes, scales and schemes of experts are equal."""
    for ours, theirs in zip(expert_modules(model), expert_modules(again), strict=True):
        assert ours.names == theirs.names
        assert repr(ours.module.stacks) == repr(theirs.module.stacks)
        for leaf in ours.module.stacks:
            held, other = ours.module.packed_stack(leaf), theirs.module.packed_stack(leaf)
            assert held.keys() == other.keys()
            assert all(torch.equal(held[name], other[name]) for name in held)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Phi3ForCausalLM"])
def test_a_window_becomes_the_context(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """llama.cpp looks at everything: the same as long as everything is within the window."""
    model = build(name, sliding_window=100)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    fields = read_gguf(tmp_path / "model.gguf").fields
    assert fields[f"{ARCHITECTURES[name].name}.context_length"] == 100
    again = load_gguf(tmp_path / "model.gguf", dtype=torch.float32, activation_dtype="float32")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar must be 64"),
        ("Gemma3ForCausalLM", {"hidden_activation": "silu"}, "must be 'gelu_pytorch_tanh'"),
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"] * 8}, "layer_types must be"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1] * 8}, "no_rope_layers must be"),
        ("MistralForCausalLM", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ("Qwen2MoeForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob must be False"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob must be True"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, r"mlp_only_layers must be \[\]"),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv must be None"),
        ("OlmoeForCausalLM", {"num_key_value_heads": 2}, "num_key_value_heads must be 4"),
        (
            "GraniteForCausalLM",
            {"rope_parameters": LINEAR},
            "rope_type must be one of",
        ),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}},
            "where it looks at a window, got 'linear'",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute(
    name: str, changes: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = build(name, **changes)
    with pytest.raises(ArgumentError, match=message):
        export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_field_that_is_missing(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    export_gguf(build("GraniteForCausalLM"), file, tokenizer=tokenizer)
    file.write_bytes(file.read_bytes().replace(b"granite.logit_scale", b"granite.logit_scalf"))
    with pytest.raises(CheckpointError, match=r"granite\.logit_scale must be a positive number"):
        load_gguf(file)


@pytest.mark.ci
@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp(
    name: str, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same logits but for activations in bfloat16; of a model that differs, others.

    One token of twenty may differ by more: its router may be undecided between two experts.
    """
    from llama_cpp import GGML_TYPE_F32, Llama

    model = build(name)
    export_gguf(model, tmp_path / "model.gguf", "BF16", tokenizer=tokenizer)
    llama: Any = Llama(
        str(tmp_path / "model.gguf"), n_ctx=LENGTH + 32, logits_all=True, verbose=False,
        n_threads=2, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
    )  # fmt: skip
    ids = torch.randint(3, 2000, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    llama.eval(ids[0].tolist())
    found = torch.tensor(llama.scores[:LENGTH], dtype=torch.float32)
    expected, other = logits(model), logits(build(name, **KINDS[name][2]))
    spread = expected.std()
    right, wrong = (
        ((other_one - found).std(1) / spread).quantile(0.95) for other_one in (expected, other)
    )
    with capsys.disabled():
        print(f"\n{name}: {float(right):.2e} of the logits' spread; changed, {float(wrong):.2e}")
    assert right <= 0.02
    assert wrong >= 5 * right
