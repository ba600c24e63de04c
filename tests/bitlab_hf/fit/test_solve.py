"""One matrix: codes and scales of less and less loss, on the grid of two levels where asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitcore.quantize import group_scale, two_levels
from bitlab_hf.fit.solve import (
    Moments,
    Scales,
    compensated_codes,
    damped,
    descend,
    loss_of,
    refit,
    rounded,
    solve,
    start_scales,
    wanted_weight,
)

# The shape of the scales, and whether they are in two levels.
SCHEMES = {
    "per_tensor": ((1, 1), False),
    "per_channel": ((24, 1), False),
    "per_group_float32": ((24, 2), False),
    "per_group": ((24, 2), True),
}


def problem(rows: int = 24, features: int = 128, tokens: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mixing
    target = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    with damped(x.t() @ x, 0.01) as hessian:
        return target, hessian.clone()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_step_lowers_the_loss(scheme: str) -> None:
    target, hessian = problem()

    def loss(codes: Tensor, scales: Scales) -> float:
        return loss_of(target - codes * scales.full(), hessian)

    shape, leveled = SCHEMES[scheme]
    scales = start_scales(target, hessian, shape)
    scales = scales.in_two_levels() if leveled else scales
    half = scales.full() / 2
    rounding = loss((target > half).double() - (target < -half).double(), scales)
    codes = compensated_codes(target, hessian, scales)
    losses = [rounding, loss(codes, scales)]
    for _ in range(2):
        scales = refit(target @ hessian, hessian, codes, scales)
        losses.append(loss(codes, scales))
        codes = descend(target, hessian, codes, scales)
        losses.append(loss(codes, scales))
    assert losses[1] < 0.7 * losses[0]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[1]
    assert set(codes.unique().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_other_code_is_better(scheme: str) -> None:
    """Descent ends where no change of one code lowers the loss."""
    target, hessian = problem()
    shape, leveled = SCHEMES[scheme]
    codes, scales = solve(target, hessian, shape, 4, leveled)
    before = None
    while before is None or not torch.equal(before, codes):
        before, codes = codes, descend(target, hessian, codes, scales)
    error = target - codes * scales.full()
    pull, diagonal = error @ hessian, hessian.diagonal()
    for other in (-1.0, 0.0, 1.0):
        change = (other - codes) * scales.full()
        # The loss with one code changed, minus the loss.
        gain = change.square() * diagonal - 2 * change * pull
        assert float(gain.min()) >= -1e-9 * loss_of(error, hessian)


def test_the_wanted_weight_takes_drift_back() -> None:
    """Inputs that went through an invertible map: the wanted weight undoes it."""
    torch.manual_seed(0)
    weight, before = torch.randn(5, 16), torch.randn(300, 16)
    map_back = torch.eye(16) + 0.1 * torch.randn(16, 16)
    after = before @ torch.linalg.inv(map_back).t()
    moments = Moments.zeros(16, weight.device)
    moments.add(before[:100], after[:100])
    moments.add(before[100:], after[100:])
    assert moments.tokens == 300
    wanted = wanted_weight(weight, moments, damping=1e-9)
    torch.testing.assert_close(wanted, (weight @ map_back).double(), rtol=1e-4, atol=1e-4)


def test_moments_are_the_same_under_autocast() -> None:
    """Rounded to bfloat16, those of tokens with one huge channel have no Cholesky factor."""
    torch.manual_seed(0)
    inputs = torch.randn(2000, 96)
    # A token in a hundred is huge in one direction, as massive activations are.
    inputs[::100] += 3000 * torch.randn(96)
    found = []
    for enabled in (False, True):
        moments, wanting = (Moments.zeros(96, inputs.device) for _ in range(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            moments.add(inputs, inputs)
            wanting.add_wanted(inputs[:, :8], inputs)
        assert wanting.wanted is not None
        found.append((moments.hessian, moments.cross, wanting.hessian, wanting.wanted))
        wanted_weight(torch.randn(8, 96), moments, 1e-4)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def on_grid(scales: Scales, codes: Tensor) -> Tensor:
    """Returns the multipliers, after a look at whether estimators would find the same."""
    groups = scales.values.shape[1]
    used = (codes.view(len(codes), groups, -1) != 0).any(2)
    row, multiplier = two_levels(scales.values.float())
    assert torch.equal(group_scale(row, multiplier).double(), scales.values)
    largest = torch.where(used, multiplier, 0).amax(1)
    assert (largest[used.any(1)] == 127).all()
    return multiplier


def hard_problem(kind: str) -> tuple[Tensor, Tensor]:
    """Rows of 4 groups of 64 with what two levels might stumble on."""
    target, hessian = problem(features=256)
    groups = target.view(24, 4, 64)
    if kind == "large":
        groups[:, 2] *= 1000
        # Otherwise the small ones would grow to make up for the large one's error.
        hessian = torch.eye(256, dtype=torch.float64)
    elif kind == "zeros":
        groups[::2, 0] = 0.0
        groups[3] = 0.0
    elif kind == "tiny":
        groups[:12] *= 1e-4
        groups[12:] *= 1e-8
    return target, hessian


@pytest.mark.parametrize("kind", ["plain", "large", "zeros", "tiny"])
def test_scales_stay_in_two_levels_and_end_in_them(kind: str) -> None:
    target, hessian = hard_problem(kind)
    scales = start_scales(target, hessian, (24, 4)).in_two_levels()
    on_grid(scales, torch.ones_like(target))
    codes = compensated_codes(target, hessian, scales)
    for _ in range(3):
        scales = refit(target @ hessian, hessian, codes, scales)
        on_grid(scales, codes)
        codes = descend(target, hessian, codes, scales)
    codes, scales = solve(target, hessian, (24, 4), 0, leveled=True)
    on_grid(scales, codes)
    codes, scales = solve(target, hessian, (24, 4), 4, leveled=True)
    multiplier = on_grid(scales, codes)
    if kind == "large":
        assert (multiplier[:, 2] == 127).all()
        assert (multiplier[:, [0, 1, 3]] == 1).all()
    elif kind == "tiny":
        # Weights far below the least scale there is.
        assert (codes[12:] == 0).all()
        torch.testing.assert_close(scales.values[12:], torch.full((12, 4), 1e-5).double())
    else:
        assert multiplier.unique().numel() > 10


def test_no_other_multiplier_is_better() -> None:
    """Refitting ends where no multiple but its own serves a group better, the largest aside."""
    target, hessian = hard_problem("plain")
    codes, scales = solve(target, hessian, (24, 4), 2, leveled=True)
    before = None
    while before is None or not torch.equal(before, scales.values):
        before, scales = scales.values, refit(target @ hessian, hessian, codes, scales)
    row, multiplier = two_levels(scales.values.float())

    def losses(multiplier: Tensor) -> Tensor:
        error = target - codes * scales.replaced(group_scale(row, multiplier).double()).full()
        return ((error @ hessian) * error).sum(1)

    best, moved = losses(multiplier), 0
    for group in range(4):
        for change in (-1, 1):
            other = multiplier.clone()
            free = multiplier[:, group] < 127
            other[:, group] = torch.where(free, multiplier[:, group] + change, 127)
            moved += int(free.sum())
            assert (losses(other) >= best * (1 - 1e-12)).all()
    assert moved > 100


def test_two_levels_cost_next_to_nothing() -> None:
    """Against one float32 a group, on the same problem."""
    target, hessian = hard_problem("plain")
    lost = []
    for leveled in (False, True):
        codes, scales = solve(target, hessian, (24, 4), 4, leveled)
        lost.append(loss_of(target - codes * scales.full(), hessian))
    assert lost[1] < 1.03 * lost[0]
    # The same codes with scales that are rounded, and rounding alone: how little it could be.
    rounding = rounded(target, scales.full())
    assert lost[1] < 0.5 * loss_of(target - rounding * scales.full(), hessian)
