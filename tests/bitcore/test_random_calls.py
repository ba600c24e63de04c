"""Random calls of every op, over layouts, dtypes, shapes and schemes, against the reference on
plain tensors: integer paths bit for bit, float paths to the rounding of their dtype.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import torch
from torch import Tensor

import bitcore
from bitcore import checks, pack_ternary, reference, unpack_ternary
from bitcore.prepared import PreparedLinear
from tests.bitcore.layouts import plain, some_layout

OPS = torch.ops.bitlab
# Set to repeat a failure; otherwise every run tries other calls.
SEED_VARIABLE = "BITLAB_TEST_SEED"
CALLS = 60
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the sum of magnitudes: half of the last place, and what float32 sums add to it.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLOAT_SUMS = 2.0**-19


def calls() -> Iterator[Case]:
    """Cases of a seed, which a failing test shows."""
    seed = int(os.environ.get(SEED_VARIABLE, random.SystemRandom().randrange(2**32)))
    for call in range(CALLS):
        print(f"call {call} of {SEED_VARIABLE}={seed}")
        torch.manual_seed(seed + call)
        yield Case(random.Random(seed + call))


class Case:
    """Random arguments, each of some layout."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.tokens = rng.choice([0, 1, 2, 3, 7, 16, 17, 33])
        self.out_features, self.in_features = rng.choice([1, 5, 64, 65]), rng.choice([64, 65, 128])
        if rng.random() < 0.3:
            self.in_features = 192
        self.group_size = 64 if self.in_features % 128 else rng.choice([64, 128])
        granularities = ["per_tensor", "per_channel"]
        if self.in_features % 64 == 0:
            granularities += ["per_group", "per_group_float32"]
        self.granularity = rng.choice(granularities)
        self.activation = rng.choice(["int8_per_token", "int8_per_tensor", "float"])
        self.out_dtype = rng.choice(DTYPES)

    def float_tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape).to(dtype or self.rng.choice(DTYPES))
        return some_layout(values, self.rng)

    def tokens_of(self, columns: int) -> Tensor:
        """Float [M, columns], or of another rank."""
        shapes = [(self.tokens, columns), (self.tokens, 1, columns), (2, self.tokens, columns)]
        shapes += [(columns,)] if self.tokens == 1 else []
        return self.float_tensor(*self.rng.choice(shapes))

    def scale(self, of_groups: tuple[str, ...] = ("per_group_float32",)) -> Tensor:
        """Scales that multiply; some are negative or zero, which nobody should give."""
        shape: tuple[int, ...] = (1,)
        if self.granularity in of_groups:
            shape = (self.out_features, self.in_features // self.group_size)
        elif self.granularity != "per_tensor":
            shape = (self.out_features,)
        values = torch.rand(shape) + 0.01
        if self.rng.random() < 0.2:
            values *= torch.randint(-1, 2, shape)
        return some_layout(values, self.rng)

    def step(self) -> Tensor:
        """Steps, or learned scales: of groups one each, in either form."""
        return self.scale(checks.GROUPED)

    def multiplier(self) -> Tensor | None:
        if self.granularity != "per_group":
            return None
        shape = (self.out_features, self.in_features // self.group_size)
        return some_layout(torch.randint(0, 128, shape, dtype=torch.uint8), self.rng)

    def qweight(self) -> Tensor:
        codes = torch.randint(-1, 2, (self.out_features, self.in_features), dtype=torch.int8)
        return some_layout(pack_ternary(codes), self.rng)

    def weight(self) -> Tensor:
        return self.float_tensor(self.out_features, self.in_features)

    def bias(self) -> Tensor | None:
        return self.float_tensor(self.out_features) if self.rng.random() < 0.5 else None


def dense(qweight: Tensor, scale: Tensor, out_features: int, multiplier: Tensor | None) -> Tensor:
    """Codes times multiplier and scale in float64, where that product is exact."""
    codes = unpack_ternary(plain(qweight), out_features).double()
    if multiplier is not None:
        width = codes.shape[1] // multiplier.shape[1]
        codes *= plain(multiplier).double().repeat_interleave(width, 1)
    columns = scale.shape[1] if scale.dim() == 2 else 1
    grouped = codes.view(out_features, columns, -1) * plain(scale).double().view(-1, columns, 1)
    return grouped.view(codes.shape)


def assert_product(y: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, loose: bool) -> None:
    """``y = a @ b + bias`` to the rounding of the operands, if `loose`, and of the result."""
    exact, most = plain(a).double() @ b, plain(a).double().abs() @ b.abs()
    if bias is not None:
        exact, most = exact + plain(bias).double(), most + plain(bias).double().abs()
    # Rounded operands: each by half of the last place of the narrower dtype, and the sums.
    bound = FLOAT_SUMS * most + ROUNDING[y.dtype] * exact.abs()
    if loose:
        narrow = max(ROUNDING[y.dtype], ROUNDING[a.dtype])
        bound = bound + 4 * narrow * most
    # float16 is subnormal below 2^-14.
    bound = bound + (2.0**-24 if y.dtype == torch.float16 else 2.0**-120)
    assert ((y.double() - exact).abs() <= bound).all()


def call_on_plain(op: object, args: tuple[object, ...]) -> object:
    """What the reference gives for the same values in plain memory."""
    copies = tuple(plain(a) if isinstance(a, Tensor) else a for a in args)
    with bitcore.use_backend("reference"):
        return op(*copies)  # type: ignore[operator]


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(ours, Tensor):
        ours, theirs = (ours,), (theirs,)
    for one, other in zip(ours, theirs, strict=True):  # type: ignore[call-overload]
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_linear(backend: str) -> None:
    for case in calls():
        x, qweight, scale, bias, multiplier = (
            case.tokens_of(case.in_features),
            case.qweight(),
            case.scale(),
            case.bias(),
            case.multiplier(),
        )
        args = (qweight, scale, bias, case.out_features, case.activation)
        prepared = PreparedLinear(*args, multiplier)
        calls_of = [(x, *args, dtype, multiplier) for dtype in (case.out_dtype, x.dtype)]
        with torch.no_grad():
            results = [*(OPS.linear(*one) for one in calls_of), prepared(x)]
        assert_same(results[2], results[1])
        for y, one in zip(results, calls_of, strict=False):
            if case.activation == "float":
                weight = dense(qweight, scale, case.out_features, multiplier).t()
                assert_product(y, x, weight, bias, loose=backend == "reference")
            else:
                assert_same(y, call_on_plain(OPS.linear, one))


def test_the_ops_of_packed_weights(backend: str) -> None:
    for case in calls():
        out_features, qweight, scale = case.out_features, case.qweight(), case.scale()
        codes = torch.randint(-128, 128, (case.tokens, case.in_features), dtype=torch.int8)
        args: tuple[object, ...] = (some_layout(codes, case.rng), qweight, out_features)
        assert_same(OPS.matmul(*args), call_on_plain(OPS.matmul, args))
        multiplier = case.multiplier()
        args = (qweight, scale, out_features, case.out_dtype, multiplier)
        assert_same(OPS.unpack_weight(*args), call_on_plain(OPS.unpack_weight, args))
        dy = case.tokens_of(out_features)
        dx = OPS.input_gradient(dy, qweight, scale, out_features, case.out_dtype, multiplier)
        loose = backend == "reference" or reference.multiplied_in(dy.dtype) == torch.bfloat16
        assert_product(dx, dy, dense(qweight, scale, out_features, multiplier), None, loose)


def test_the_ops_of_float_weights(backend: str) -> None:
    for case in calls():
        weight = case.weight()
        args: tuple[object, ...] = (weight, case.granularity, case.group_size)
        assert_same(OPS.pack_weight(*args), call_on_plain(OPS.pack_weight, args))
        args = (weight, case.step())
        assert_same(OPS.pack_codes(*args), call_on_plain(OPS.pack_codes, args))
        args = (weight, case.rng.choice(["absmean", "absmax"]), case.granularity, case.group_size)
        assert_same(OPS.estimate(*args), call_on_plain(OPS.estimate, args))
        args = (case.tokens_of(case.in_features), case.rng.random() < 0.5)
        assert_same(OPS.quantize_activation(*args), call_on_plain(OPS.quantize_activation, args))


def test_the_gradients_of_learned_scales(backend: str) -> None:
    for case in calls():
        weight, step = case.weight(), case.step()
        args = (case.float_tensor(*weight.shape), weight, step)
        gradient, of_step = OPS.learned_gradients(*args)
        expected, expected_of_step = call_on_plain(OPS.learned_gradients, args)  # type: ignore[misc]
        assert_same(gradient, expected)
        assert of_step.is_contiguous()
        # Sums in another order; steps of zero make NaN and infinity of them.
        most = plain(args[0]).abs().float().view(step.numel(), -1).sum(1).view(step.shape)
        bound = FLOAT_SUMS * most / (weight.numel() // step.numel()) ** 0.5
        same = (of_step == expected_of_step) | (of_step.isnan() & expected_of_step.isnan())
        assert (same | ((of_step - expected_of_step).abs() <= bound)).all()


def test_the_ops_of_int8_weights(backend: str) -> None:
    for case in calls():
        shape = case.out_features, case.in_features
        qweight = some_layout(torch.randint(-127, 128, shape, dtype=torch.int8), case.rng)
        scale = some_layout(torch.rand(case.out_features), case.rng)
        args = (case.tokens_of(case.in_features), qweight, scale, case.bias(), case.out_dtype)
        assert_same(OPS.linear_int8(*args), call_on_plain(OPS.linear_int8, args))
        dy = case.tokens_of(case.out_features)
        dx = OPS.input_gradient_int8(dy, qweight, scale, case.out_dtype)
        rows = plain(qweight).double() * plain(scale).double()[:, None]
        assert_product(dx, dy, rows, None, loose=False)


def train(
    tensors: list[Tensor | None], scheme: tuple[object, ...], dy: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The output of a training step, and the gradients of x, weight, bias and a learned scale."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors[:3]]
    step, scale, multiplier = [None if t is None else t.detach() for t in tensors[3:]]
    if scale is not None and step is None:
        leaves.append(scale.requires_grad_())
    y = OPS.qat_linear(*leaves[:3], *scheme, step, scale, multiplier)[0]
    y.backward(dy)
    grads = [None if leaf is None else leaf.grad for leaf in leaves]
    return y.detach(), [grad for grad in grads if grad is not None]


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """The same numbers, added up in another order or by another of torch's own products."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[ours.dtype]
    most = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * most)


def test_training(backend: str) -> None:
    """Forward and gradients are those of plain tensors."""
    for case in calls():
        x, step, scale, multiplier = case.tokens_of(case.in_features), None, None, None
        kind = case.rng.choice(["absmean", "constants", "learned"])
        if kind == "learned":
            scale = case.step()
        if kind == "constants":
            step, scale, multiplier = case.step(), case.scale(), case.multiplier()
        tensors = [x, case.weight(), case.bias(), step, scale, multiplier]
        scheme = (case.granularity, case.group_size, case.activation, case.out_dtype)
        dy = case.float_tensor(*x.shape[:-1], case.out_features, dtype=case.out_dtype)
        y, grads = train(tensors, scheme, dy)
        copies = [None if t is None else plain(t) for t in tensors]
        expected, expected_grads = train(copies, scheme, plain(dy))
        if case.activation == "float":
            assert_near(y, expected)
        else:
            assert_same(y, expected)
        for ours, theirs in zip(grads, expected_grads, strict=True):
            assert_near(ours, theirs)
