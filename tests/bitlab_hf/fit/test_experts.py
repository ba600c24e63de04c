"""Calibration of experts: by the tokens that reach each, in bounded memory, resumable."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from bitcore.errors import LifecycleError, NonFiniteError
from bitlab_hf import BitLabConfig, deploy
from bitlab_hf.fit import experts as module
from bitlab_hf.fit.experts import fit_experts
from bitlab_hf.fit.kept import OtherFitError
from bitlab_hf.fit.matrix import ExpertMatrix
from bitlab_hf.fit.solve import Moments
from bitlab_hf.fit.streams import Unit
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.train import calibrate
from bitlayers.experts import BitExperts
from tests.bitlab_hf.experts import load, make_moe
from tests.bitlab_hf.models import VOCABULARY

GROUPS: dict[str, Any] = {"weight_granularity": "per_group", "group_size": 64}
CHANNELS: dict[str, Any] = {"weight_granularity": "per_channel"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("float")
    names = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
    return {name: make_moe(name, folder) for name in names}


def latent(source: Path, **fields: Any) -> Any:
    return load(source, quantization_config=BitLabConfig(**fields))


def samples(count: int = 48, seed: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, 32), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def held_out(model: Any, original: Any) -> float:
    """The loss that distillation has: the divergence from the original model, on other text."""
    ids = samples(16, seed=9)
    ours, theirs = (one.eval()(input_ids=ids).logits.log_softmax(-1) for one in (model, original))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("fields", [{}, CHANNELS, GROUPS, {"weight_quantizer": "twn"}])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_calibrated_is_better_than_rounded(
    sources: dict[str, Path], name: str, fields: dict[str, Any]
) -> None:
    original, model = load(sources[name]), latent(sources[name], **fields)
    rounded = held_out(model, original)
    seen: list[tuple[int, int, str]] = []
    report = calibrate(model, samples(), progress=lambda *args: seen.append(args))
    assert held_out(model, original) < 0.6 * rounded
    experts = {layer.name: layer for layer in report.layers if ".experts." in layer.name}
    for layer in experts.values():
        assert layer.error < 0.7 * layer.rounding_error, layer
    # Every matrix is in the report, or its expert is among those that no token reached.
    count = model.model.layers[0].mlp.experts.num_experts
    for block in range(2):
        for number in range(count):
            one = f"model.layers.{block}.mlp.experts.{number}"
            held = [f"{one}.{leaf}" in experts for leaf in ("gate_up_proj", "down_proj")]
            assert held == [one not in report.rounded] * 2
    total = len(report.layers) + 2 * len(report.rounded)
    assert [done for done, _, _ in seen] == list(range(1, total + 1))
    assert {all_ for _, all_, _ in seen} == {total}
    ids = samples(2, seed=1)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert torch.equal(model.train()(input_ids=ids).logits, before)
        assert torch.equal(deploy(model)(input_ids=ids).logits, before)


def test_experts_alone_make_the_difference(sources: dict[str, Path]) -> None:
    """With layers calibrated either way, experts by their tokens are worth more than rounded."""
    original = load(sources["mixtral"])
    config = {"modules_to_not_convert": [".*self_attn", "lm_head"]}
    model = latent(sources["mixtral"], **config)
    rounded = held_out(model, original)
    report = calibrate(model, samples())
    assert len(report.layers) == 2 * 4 * 2
    assert held_out(model, original) < 0.5 * rounded


@pytest.mark.parametrize("fields", [{}, GROUPS, {**GROUPS, "group_scale_dtype": "float32"}])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_deployed_codes_are_those_that_were_solved(
    sources: dict[str, Path], tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    """Whether rows lie in turn, transposed, or gate and up apart with a scale each."""
    skip = {"modules_to_not_convert": [".*self_attn.*", "lm_head"]}
    model = latent(sources[name], **fields, **skip)
    report = calibrate(model, samples(12), folder=tmp_path)
    deploy(model)
    checked = 0
    for found in expert_modules(model):
        for leaf in found.module.stacks:
            for number in range(found.module.num_experts):
                one = f"{found.names[0]}.{number}"
                if one in report.rounded:
                    continue
                with safe_open(tmp_path / f"{one}.{leaf}.safetensors", "pt") as file:
                    wanted, scales = file.get_tensor("qweight"), file.get_tensor("scales")
                packed = found.module.packed(leaf, number)
                assert torch.equal(packed[0], wanted)
                scale = packed[1] if packed[1].dim() == 2 else packed[1].unsqueeze(1)
                if len(packed) == 3:
                    scale = scale * packed[2]
                    used = (packed[2] > 0).all(1)
                    scale, scales = scale[used], scales[used]
                torch.testing.assert_close(scale.double(), scales, rtol=1e-5, atol=0)
                checked += 1
    assert checked >= 8


def test_experts_that_no_token_reaches(sources: dict[str, Path], tmp_path: Path) -> None:
    model = latent(sources["gpt_oss"])
    experts = [one.module for one in expert_modules(model)]
    with torch.no_grad():
        for block, number in ((0, 2), (1, 0)):
            model.model.layers[block].mlp.router.bias[number] = -1e9
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = calibrate(model, samples(), folder=tmp_path)
    unreached = {"model.layers.0.mlp.experts.2", "model.layers.1.mlp.experts.0"}
    assert unreached <= set(report.rounded)
    assert f"{len(report.rounded)} experts that no token reached keep" in str(report)
    assert report.rounded[0] in str(report)
    after = dict(model.named_parameters())
    for block, one in enumerate(experts):
        for leaf in one.stacks:
            name = f"model.layers.{block}.mlp.experts.{leaf}"
            for number in range(4):
                kept = f"model.layers.{block}.mlp.experts.{number}" in report.rounded
                assert torch.equal(after[name][number], before[name][number]) == kept
    # What a folder keeps says so too: nothing is done again.
    again = latent(sources["gpt_oss"])
    again.load_state_dict(before)
    assert calibrate(again, samples(), folder=tmp_path).rounded == report.rounded


def test_a_few_tokens_are_better_than_none(sources: dict[str, Path]) -> None:
    """Two texts of 32 tokens: what they reach is better for other texts, too."""
    original, model = load(sources["mixtral"]), latent(sources["mixtral"])
    rounded = held_out(model, original)
    calibrate(model, samples(2))
    assert held_out(model, original) < 0.9 * rounded


def test_all_are_reached_here(sources: dict[str, Path]) -> None:
    report = calibrate(latent(sources["mixtral"]), samples())
    assert report.rounded == ()
    assert "keep" not in str(report)


class Killed(Exception):  # noqa: N818  (what a kill does)
    pass


@pytest.fixture(scope="module")
def straight(sources: dict[str, Path]) -> tuple[Any, Any]:
    """A model that was calibrated in one go, and the report."""
    model = latent(sources["qwen3_moe"])
    return model, calibrate(model, samples(12))


# A block of this model: query, key and value; the output; 5 first matrices, 5 second ones.
@pytest.mark.parametrize("layers", [4, 5, 8, 9, 11, 14, 28])
def test_resumed_is_straight(
    sources: dict[str, Path], straight: tuple[Any, Any], tmp_path: Path, layers: int
) -> None:
    resumed = latent(sources["qwen3_moe"])
    before = {key: value.clone() for key, value in resumed.state_dict().items()}

    def kill(done: int, _all: int, _name: str) -> None:
        if done == layers:
            raise Killed

    with pytest.raises(Killed):
        calibrate(resumed, samples(12), folder=tmp_path, progress=kill)
    assert all(torch.equal(value, before[key]) for key, value in resumed.state_dict().items())
    assert "forward" not in vars(resumed.model.layers[0].mlp.experts)
    assert len(list(tmp_path.glob("*.safetensors"))) == layers
    again = calibrate(resumed, samples(12), folder=tmp_path)
    model, report = straight
    assert again.layers == report.layers
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_another_expert_is_another_model(sources: dict[str, Path], tmp_path: Path) -> None:
    calibrate(latent(sources["mixtral"]), samples(12), folder=tmp_path)
    other = latent(sources["mixtral"])
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj[3, 0, 0] += 1e-3
    with pytest.raises(OtherFitError, match=r"layers\.1\.mlp\.experts\.3\.down_proj had another"):
        calibrate(other, samples(12), folder=tmp_path)


def test_one_experts_hessians_at_a_time(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = [0]
    make = Moments.zeros

    def zeros(features: int, device: torch.device) -> Moments:
        gc.collect()
        found = make(features, device)
        alive.append(weakref.ref(found.hessian))
        most[0] = max(most[0], sum(one() is not None for one in alive))
        return found

    monkeypatch.setattr(Moments, "zeros", zeros)
    calibrate(latent(sources["qwen3_moe"]), samples(12))
    assert len(alive) > 20
    assert most[0] == 1


def test_what_stands_behind_is_taken_back(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream behind experts is nearer to the original with the sums than without."""
    original = load(sources["mixtral"])
    with torch.no_grad():
        for name, parameter in original.model.layers.named_parameters():
            if "proj" in name:
                parameter.mul_(4)
    ids = samples(64)
    with torch.no_grad():
        wanted = original.model(ids).last_hidden_state

    def distance() -> float:
        model = latent(sources["mixtral"], **CHANNELS)
        with torch.no_grad():
            model.load_state_dict(original.state_dict())
        calibrate(model, ids)
        with torch.no_grad():
            return float((model.eval().model(ids).last_hidden_state - wanted).square().mean())

    with_sums = distance()
    monkeypatch.setattr(module, "_missing", lambda *_: {})
    assert with_sums < 0.95 * distance()


def test_tokens_are_those_of_the_ternary_streams_router(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of an expert's first matrix, made anew from what the module is called with."""
    model = latent(sources["qwen3_moe"], activation_dtype="float32")
    experts = model.model.layers[1].mlp.experts
    seen: dict[str, Moments] = {}
    calls: list[tuple[bool, Tensor, Tensor, Tensor]] = []
    fit = fit_experts

    def fitted(tap: Any, unit: Unit, batches: Any, *rest: Any) -> Any:
        if tap.experts is experts:
            call = tap.__class__.__call__

            def noted(self: Any, *args: Tensor) -> Tensor:
                calls.append((self._streams.original, *args))
                return call(self, *args)

            with monkeypatch.context() as patch:
                patch.setattr(tap.__class__, "__call__", noted)
                for original in (True, False):
                    unit.run(batches[0], original, last=tap)
        *some, solve = rest

        def solved(matrix: ExpertMatrix, moments: Moments) -> Any:
            seen[matrix.name] = moments
            return solve(matrix, moments)

        yield from fit(tap, unit, batches, *some, solved)

    monkeypatch.setattr("bitlab_hf.fit.calibrate.fit_experts", fitted)
    calibrate(model, samples(8), batch_size=8)
    (_, before, _, _), (_, behind, index, _) = calls
    assert not torch.equal(before, behind)
    for number in range(5):
        rows = (index == number).any(1).nonzero().flatten()
        moments = seen[f"model.layers.1.mlp.experts.{number}.gate_up_proj"]
        assert moments.tokens == len(rows)
        x, y = behind[rows], before[rows]
        torch.testing.assert_close(moments.hessian, (x.t() @ x).double(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.cross, (y.t() @ x).double(), rtol=1e-4, atol=1e-6)


def test_under_autocast(sources: dict[str, Path]) -> None:
    """As a Trainer in bfloat16 calibrates."""
    original, model = load(sources["qwen3_moe"]), latent(sources["qwen3_moe"])
    rounded = held_out(model, original)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = calibrate(model, samples())
    assert not report.rounded
    assert held_out(model, original) < 0.6 * rounded


def test_refusals(sources: dict[str, Path]) -> None:
    model = latent(sources["mixtral"])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.experts\.down_proj must be finite"):
        calibrate(model, samples(4))
    model = latent(sources["mixtral"])
    model.model.layers[0].mlp.experts.deploy()
    with pytest.raises(LifecycleError, match=r"experts\.gate_up_proj must be latent"):
        calibrate(model, samples(4))
    assert isinstance(model.model.layers[1].mlp.experts, BitExperts)
