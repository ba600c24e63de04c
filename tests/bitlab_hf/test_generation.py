"""transformers' other ways to generate, on deployed models: the tokens of plain ``generate``.

The models are trained for a moment, so that no next token is a matter of the last bit: with int8
activations a float sum in another order moves a code now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, QuantizedLayer
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tests.bitlab_hf.greedy import greedy_tokens
from tests.bitlab_vllm.models import CASES, make_deployed, token_ids

NEW = 16
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
# Without a number of blocks the cache takes most of the memory.
PAGES: dict[str, Any] = {"num_blocks": 32, "page_size": 32}
# A code that moves changes a logit by a hundredth.
MARGIN = 0.05
MODELS = {"int8 head": "mistral-groups", "tied int8 head": "qwen2-tied", "experts": "qwen3-moe"}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("generation")
    return make_deployed(CASES[MODELS[request.param]], folder)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """From one token to more than a batch takes, of what the models have learned and not."""
    ids = token_ids(3, 4, 24)
    learned = [ids[0, :9], ids[1, :1], ids[2, :17], ids[3], ids[0, :2]]
    return [one.tolist() for one in [*learned[:2], token_ids(10, 150), *learned[2:]]]


@pytest.fixture(scope="module")
def plain(model: Any) -> Callable[[tuple[int, ...]], list[int]]:
    """What plain ``generate`` says, as far as it is no matter of the last bits."""
    return cache(lambda prompt: greedy_tokens(model, torch.tensor([prompt]), MARGIN, **OPTIONS))


def check(plain: Any, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Answers are those of plain ``generate``."""
    compared = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        sure = plain(tuple(prompt))
        assert answer[: len(sure)] == sure
        assert len(answer) == NEW
        compared += len(sure)
    assert compared > len(prompts) * NEW / 2


@pytest.mark.parametrize("batch", [16, 256])
def test_continuous_batching(model: Any, plain: Any, prompts: list[list[int]], batch: int) -> None:
    """Prompts in parts where a batch of tokens is smaller than they are."""
    found = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**OPTIONS),
        continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=batch, **PAGES),
    )
    assert [one.error for one in found.values()] == [None] * len(prompts)
    check(plain, prompts, [one.generated_tokens for one in found.values()])


def test_cancelled_requests(model: Any, plain: Any, prompts: list[list[int]]) -> None:
    """Those that go on, and one that comes after, are as if nobody had left."""
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(**OPTIONS),
        continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=64, **PAGES),
    )
    manager.start()
    try:
        leaving = [
            manager.add_request(p, request_id=f"leaves {at}", max_new_tokens=150, streaming=True)
            for at, p in enumerate(prompts[:2])
        ]
        staying = [
            manager.add_request(p, request_id=f"stays {at}", eos_token_id=-1)
            for at, p in enumerate(prompts)
        ]
        # They have begun to answer before they are gone.
        begun: set[str] = set()
        finished: dict[str, Any] = {}
        while begun != set(leaving):
            one = manager.get_result(timeout=120)
            assert one is not None
            assert not one.error
            if one.request_id in leaving:
                begun.add(one.request_id)
            elif one.is_finished():
                finished[one.request_id] = one
        for name in leaving:
            manager.cancel_request(name)
        staying.append(manager.add_request(prompts[3], request_id="late", eos_token_id=-1))
        lengths = []
        while finished.keys() != set(staying):
            one = manager.get_result(timeout=120)
            assert one is not None
            if one.request_id in leaving:
                lengths.append(len(one.generated_tokens))
            elif one.is_finished():
                finished[one.request_id] = one
    finally:
        manager.stop(block=True, timeout=120, hard_stop=True)
    assert all(length < 150 for length in lengths)
    assert not [finished[name].error for name in staying if finished[name].error]
    answers = [finished[name].generated_tokens for name in staying]
    check(plain, [*prompts, prompts[3]], answers)


def test_prompt_lookup(model: Any) -> None:
    """The prompt says twice what the model has learned: several tokens a forward pass."""
    prompt = token_ids(3, 4, 24)[0].repeat(2)[None]
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    expected = model.generate(prompt, **OPTIONS)
    hook = model.register_forward_pre_hook(count)
    try:
        found = model.generate(prompt, prompt_lookup_num_tokens=4, **OPTIONS)
    finally:
        hook.remove()
    assert torch.equal(found, expected)
    assert calls < NEW


class CoarseLayer(QuantizedLayer):
    """transformers' own quantized cache, with the rounding of its backends written out: codes of
    so many bits with a scale and a smallest value for each group.
    """

    def _quantize(self, tensor: Tensor, axis: int) -> Any:
        groups = tensor.reshape(-1, self.q_group_size)
        low = groups.amin(1, keepdim=True)
        step = ((groups.amax(1, keepdim=True) - low) / (2**self.nbits - 1)).clamp(min=1e-8)
        return ((groups - low) / step).round(), step, low, tensor.shape

    def _dequantize(self, q_tensor: Any) -> Tensor:
        codes, step, low, shape = q_tensor
        values: Tensor = (codes * step + low).view(shape)
        return values


@pytest.mark.parametrize("residual", [4, 128])
def test_quantized_cache(model: Any, plain: Any, prompts: list[list[int]], residual: int) -> None:
    """Of eight bits: the prompt's part at once, the rest whenever the residual is full."""
    # What is not learned is a matter of small differences.
    prompts, answers = [one for one in prompts if len(one) < 150], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        held = DynamicCache(config=model.config)
        held.layers = [
            CoarseLayer(nbits=8, q_group_size=32, residual_length=residual) for _ in held.layers
        ]
        given = {**OPTIONS, "attention_mask": torch.ones_like(ids), "past_key_values": held}
        answers.append(model.generate(ids, **given)[0, len(prompt) :].tolist())
        quantized = held.layers[0]._quantized_keys[-1][-2]
        assert quantized == len(prompt) if residual > NEW else quantized > len(prompt)
    check(plain, prompts, answers)
