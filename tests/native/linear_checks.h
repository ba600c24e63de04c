// Tokens that go wrong easily, and the comparison of the linear functions.
#ifndef BITLAB_TESTS_LINEAR_CHECKS_H
#define BITLAB_TESTS_LINEAR_CHECKS_H

#include "harness.h"

namespace harness {

using reference::Bias;
using reference::Scales;

struct Shape {
    int64_t M, N, K;
};

inline long long number(int64_t value) { return static_cast<long long>(value); }

// The packed form of w [N, K]; its padding is no valid code, as nothing may depend on it.
inline uint8_t *packed(const int8_t *w, int64_t N, int64_t K) {
    auto *qweight = input<uint8_t>((N + 3) / 4 * K);
    reference::pack(w, qweight, N, K, 2);
    return qweight;
}

inline void *elements(int32_t type, int64_t count) {
    if (type == BK_F32) return input<float>(count);
    return input<uint16_t>(count);
}
// Rows of K elements; the last one is the end.
inline void *tokens(int32_t type, int64_t stride, int64_t M, int64_t K) { return elements(type, (M - 1) * stride + K); }

inline void set_row(void *x, int32_t type, int64_t stride, int64_t row, int64_t K, float value) {
    for (int64_t k = 0; k < K; ++k) reference::store(x, type, row * stride + k, value);
}

// Tokens with what goes wrong easily, as far as M goes: NaN (if `invalid`), infinity, zeros, ties, tiny and huge
// values.
inline void fill_tokens(void *x, int32_t type, int64_t stride, int64_t M, int64_t K, bool invalid) {
    fill_floats(x, type, (M - 1) * stride + K, 6);
    // Between the rows lies what would spoil every result.
    for (int64_t m = 0; m + 1 < M; ++m) {
        for (int64_t k = K; k < stride; ++k) reference::store(x, type, m * stride + k, reference::nan());
    }
    if (M > 1 && invalid) reference::store(x, type, stride + K / 2, reference::nan());
    if (M > 2) set_row(x, type, stride, 2, K, 0.0f);
    if (M > 3) {
        for (int64_t k = 0; k < K; ++k) {
            reference::store(x, type, 3 * stride + k, static_cast<float>(k % 127) - 63.5f);
        }
        reference::store(x, type, 3 * stride + K - 1, 127.0f);
    }
    if (M > 4) {
        for (int64_t k = 0; k < K; ++k) reference::store(x, type, 4 * stride + k, 3e-6f * random_float(1));
    }
    if (M > 5 && invalid) reference::store(x, type, 5 * stride + K - 1, -reference::float_of(0x7F800000u));
    if (M > 6) {
        const float most = type == BK_F16 ? 65504.0f : 3.3e38f;
        for (int64_t k = 0; k < K; ++k) reference::store(x, type, 6 * stride + k, most * random_float(1));
        reference::store(x, type, 6 * stride, -most);
    }
}

// How weights are scaled. size: 0 per tensor, 1 per channel, else of groups, with two_levels by multipliers.
struct Group {
    int64_t size;
    bool two_levels;
    int64_t columns(int64_t K) const { return size > 1 ? K / size : 0; }
    // How many scales there are.
    int64_t rows(int64_t N) const { return size == 0 ? 1 : N; }
    int64_t scales(int64_t N, int64_t K) const { return rows(N) * (size > 1 && !two_levels ? columns(K) : 1); }
};

// What a linear call is given besides its shape.
struct Options {
    int32_t x_type, y_type, bias_type;  // bias_type: -1 for none
    Group group;
    bool per_tensor, int8_weights;
};

// Any multipliers, those at the ends often; behind them is nothing.
inline uint8_t *fill_multipliers(int64_t count) {
    auto *multipliers = input<uint8_t>(count);
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = random_bits() >> 22;
        multipliers[i] = static_cast<uint8_t>(bits < 128 ? 0 : bits < 256 ? 127 : bits % 128);
    }
    return multipliers;
}

// Everything a linear call takes, and its outputs.
struct Linear {
    Shape s;
    Options o;
    int64_t stride;
    void *x;
    int8_t *w;
    uint8_t *qweight, *multiplier;
    Scales scales;
    Bias bias;
    unsigned char *y;
    void *work;

    Linear(const Shape &shape, const Options &options, int32_t planes) : Linear(shape, options, planes, shape.K + 3) {}
    // A stride of 0 makes all tokens the same memory.
    Linear(const Shape &shape, const Options &options, int32_t planes, int64_t stride)
        : s(shape), o(options), stride(stride) {
        x = tokens(o.x_type, stride, s.M, s.K);
        w = o.int8_weights ? input<int8_t>(s.N * s.K) : array<int8_t>(s.N * s.K);
        fill_tokens(x, o.x_type, stride, s.M, s.K, !o.per_tensor);
        if (o.int8_weights) {
            for (int64_t i = 0; i < s.N * s.K; ++i) w[i] = static_cast<int8_t>(random_bits() % 255 - 127);
        } else {
            fill_ternary(w, s.N * s.K);
        }
        qweight = o.int8_weights ? nullptr : packed(w, s.N, s.K);
        const int64_t columns = o.group.columns(s.K);
        const int64_t count = o.group.scales(s.N, s.K);
        auto *values = input<float>(count);
        fill_scales(values, count);
        multiplier = o.group.two_levels ? fill_multipliers(s.N * columns) : nullptr;
        scales = {values, o.group.rows(s.N), columns, multiplier};
        bias = {nullptr, BK_F32};
        if (o.bias_type >= 0) {
            void *terms = elements(o.bias_type, s.N);
            fill_floats(terms, o.bias_type, s.N, 4);
            bias = {terms, o.bias_type};
        }
        y = output(s.M * s.N * size_of(o.y_type), size_of(o.y_type));
        work = workspace(s.M, s.K, columns, planes);
    }
    void constant(float value, int8_t weight) {
        for (int64_t m = 0; m < s.M; ++m) set_row(x, o.x_type, stride, m, s.K, value);
        memset(w, weight, static_cast<size_t>(s.N * s.K));
        if (qweight) reference::pack(w, qweight, s.N, s.K, 2);
        if (multiplier) memset(multiplier, 127, static_cast<size_t>(s.N * scales.columns));
    }
    bk_linear_args arguments() const {
        const void *weight = o.int8_weights ? static_cast<const void *>(w) : qweight;
        return {weight, scales.values, scales.rows, scales.columns, multiplier, bias.values, bias.type, s.N,
                s.K,    o.per_tensor,  x,           o.x_type,       stride,     y,           o.y_type,  s.M,
                work,   threads};
    }
    int32_t call_i8() const {
        const bk_linear_args args = arguments();
        return o.int8_weights ? bk_cpu_linear_i8_i8(&args) : bk_cpu_linear_i8_t2(&args);
    }
    int32_t call_f32() const {
        const bk_linear_args args = arguments();
        return bk_cpu_linear_f32_t2(&args);
    }
};

inline void begin_linear(const char *name, const Shape &s, const Options &o) {
    begin("%s M %lld N %lld K %lld, types %d %d %d, group %lld, two_levels %d, per_tensor %d", name, number(s.M),
          number(s.N), number(s.K), o.x_type, o.y_type, o.bias_type, number(o.group.size), o.group.two_levels,
          o.per_tensor);
}

inline void check_linear_i8(const Linear &linear) {
    const Shape &s = linear.s;
    auto *codes = array<int8_t>(s.M * s.K);
    auto *x_scale = array<float>(s.M);
    void *want = array<unsigned char>(s.M * s.N * size_of(linear.o.y_type));
    reference::quantize(linear.x, linear.o.x_type, linear.stride, codes, x_scale, s.M, s.K, linear.o.per_tensor);
    reference::linear_i8(codes, x_scale, linear.w, linear.scales, linear.bias, want, linear.o.y_type, s.M, s.N, s.K);
    on_every_isa([&] { return linear.call_i8(); }, [&] { expect(linear.y, want, linear.o.y_type, s.M, s.N); });
}

// The result lies between the roundings of the interval's ends, and is the same on every instruction set.
inline void check_linear_f32(const Linear &linear) {
    const Shape &s = linear.s;
    const int32_t type = linear.o.y_type;
    const int64_t size = s.M * s.N * size_of(type);
    auto *values = array<double>(s.K);
    auto *lost = array<double>(s.K);
    void *low = array<unsigned char>(size);
    void *high = array<unsigned char>(size);
    void *first = array<unsigned char>(size);
    for (int64_t m = 0; m < s.M; ++m) {
        reference::measure_token(linear.x, linear.o.x_type, m * linear.stride, s.K, values, lost);
        const bool valid = reference::absmax(linear.x, linear.o.x_type, m * linear.stride, s.K) >= 0.0f;
        for (int64_t n = 0; n < s.N; ++n) {
            const reference::Interval y =
                reference::linear_f32(values, lost, linear.w + n * s.K, linear.scales, linear.bias, n, s.K);
            const double value = valid ? y.value : static_cast<double>(reference::nan());
            reference::store(low, type, m * s.N + n, static_cast<float>(value - y.tolerance));
            reference::store(high, type, m * s.N + n, static_cast<float>(value + y.tolerance));
        }
    }
    bool have_first = false;
    const auto check = [&] {
        if (!have_first) memcpy(first, linear.y, static_cast<size_t>(size));
        have_first = true;
        expect(linear.y, first, type, s.M, s.N);
        for (int64_t i = 0; i < s.M * s.N; ++i) {
            if (is_nan(low, type, i) && is_nan(linear.y, type, i)) continue;
            const float y = reference::load(linear.y, type, i);
            if (y >= reference::load(low, type, i) && y <= reference::load(high, type, i)) continue;
            fail("outside the interval", i / s.N, i % s.N, element(linear.y, type, i), element(low, type, i));
        }
    };
    on_every_isa([&] { return linear.call_f32(); }, check);
}

}  // namespace harness

#endif
