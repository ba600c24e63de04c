// Slow, plain versions of what bitkernels.h specifies; no vectors, no libm, no heap, so that they run anywhere.
#ifndef BITLAB_TESTS_REFERENCE_H
#define BITLAB_TESTS_REFERENCE_H

#include <stdint.h>
#include <string.h>

#include "bitkernels.h"

namespace reference {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
// 2^exponent for a normal float64.
inline double pow2(int exponent) {
    const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
    double value;
    memcpy(&value, &bits, 8);
    return value;
}
inline bool finite(float value) { return (bits_of(value) & 0x7F800000u) != 0x7F800000u; }
inline float nan() { return float_of(0x7FC00000u); }
inline float absolute(float value) { return float_of(bits_of(value) & 0x7FFFFFFFu); }

// Half to even, for |value| < 2^51.
inline double round_even(double value) {
    const double shift = 6755399441055744.0;
    volatile double sum = value + shift;
    return sum - shift;
}

inline int64_t size_of(int32_t type) { return type == BK_F32 ? 4 : 2; }

inline double from_half(uint32_t half) {
    const int exponent = static_cast<int>(half >> 10 & 31);
    const double fraction = half & 1023;
    const double sign = half & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31)
        return fraction != 0 ? static_cast<double>(nan()) : sign * static_cast<double>(float_of(0x7F800000u));
    return exponent == 0 ? sign * fraction * pow2(-24) : sign * (1024 + fraction) * pow2(exponent - 25);
}

inline uint32_t to_half(float value) {
    const uint32_t sign = bits_of(value) >> 16 & 0x8000;
    if (value != value) return 0x7E00;
    const double magnitude = static_cast<double>(absolute(value));
    if (magnitude >= 65520.0) return sign | 0x7C00;
    const int own = static_cast<int>(bits_of(value) >> 23 & 255) - 127;
    const int exponent = own < -14 ? -14 : own;
    // The code of a magnitude is linear within a binade, and a carry moves on to the next one.
    const double steps = round_even(magnitude * pow2(10 - exponent));
    return sign | static_cast<uint32_t>(static_cast<int64_t>(steps) + (static_cast<int64_t>(exponent + 14) << 10));
}

inline float load(const void *data, int32_t type, int64_t i) {
    if (type == BK_F32) {
        float value;
        memcpy(&value, static_cast<const char *>(data) + 4 * i, 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, static_cast<const char *>(data) + 2 * i, 2);
    if (type == BK_BF16) return float_of(static_cast<uint32_t>(bits) << 16);
    return static_cast<float>(from_half(bits));
}

inline void store(void *data, int32_t type, int64_t i, float value) {
    if (type == BK_F32) {
        memcpy(static_cast<char *>(data) + 4 * i, &value, 4);
        return;
    }
    uint32_t bits = bits_of(value);
    if (type == BK_F16) {
        bits = to_half(value);
    } else {
        bits = value != value ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    const uint16_t half = static_cast<uint16_t>(bits);
    memcpy(static_cast<char *>(data) + 2 * i, &half, 2);
}

inline int32_t dot(const int8_t *a, const int8_t *b, int64_t count) {
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += a[k] * b[k];
    return sum;
}

// max|x|, or NaN if the values hold NaN or infinity.
inline float absmax(const void *x, int32_t type, int64_t first, int64_t count) {
    float most = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
        const float value = load(x, type, first + k);
        if (!finite(value)) return nan();
        if (absolute(value) > most) most = absolute(value);
    }
    return most;
}

inline void quantize(const void *x, int32_t type, int64_t stride, int8_t *codes, float *scale, int64_t M, int64_t K,
                     bool per_tensor) {
    float tensor = 0.0f;
    for (int64_t m = 0; m < M; ++m) {
        const float most = absmax(x, type, m * stride, K);
        if (!(most <= tensor)) tensor = most;
        if (tensor != tensor) break;
    }
    for (int64_t m = 0; m < M; ++m) {
        float most = per_tensor ? tensor : absmax(x, type, m * stride, K);
        if (most < 1e-5f) most = 1e-5f;
        const bool valid = most == most;
        const float a = 127.0f / most;
        for (int64_t k = 0; k < K; ++k) {
            const float product = valid ? load(x, type, m * stride + k) * a : 0.0f;
            const double code = round_even(static_cast<double>(product));
            codes[m * K + k] = static_cast<int8_t>(code < -128 ? -128 : code > 127 ? 127 : code);
        }
        scale[m] = most / 127.0f;
    }
}

// Weight scales by their place: one, one a row, or one a group of a row; with multipliers one a row.
struct Scales {
    const float *values;
    int64_t rows, columns;
    const uint8_t *multiplier;
    float at(int64_t n, int64_t group) const {
        if (multiplier) return values[n];
        return values[columns ? n * columns + group : rows == 1 ? 0 : n];
    }
    int32_t factor(int64_t n, int64_t group) const { return multiplier ? multiplier[n * columns + group] : 1; }
};

struct Bias {
    const void *values;
    int32_t type;
    float at(int64_t n) const { return load(values, type, n); }
};

// bk_cpu_linear_i8_t2 and, with int8 weights, bk_cpu_linear_i8_i8. w is int8 [N, K].
inline void linear_i8(const int8_t *codes, const float *x_scale, const int8_t *w, const Scales &scales,
                      const Bias &bias, void *y, int32_t y_type, int64_t M, int64_t N, int64_t K) {
    const int64_t groups = scales.columns ? scales.columns : 1;
    const int64_t width = K / groups;
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
            float value = 0.0f;
            if (scales.multiplier) {
                int64_t acc = 0;
                for (int64_t g = 0; g < groups; ++g) {
                    acc += scales.factor(n, g) * dot(codes + m * K + g * width, w + n * K + g * width, width);
                }
                const float scale = x_scale[m] * scales.at(n, 0);
                value = static_cast<float>(acc) * scale;
            } else if (scales.columns) {
                for (int64_t g = 0; g < groups; ++g) {
                    const int32_t acc = dot(codes + m * K + g * width, w + n * K + g * width, width);
                    const float part = static_cast<float>(acc) * scales.at(n, g);
                    value = value + part;
                }
                value = value * x_scale[m];
            } else {
                const float scale = x_scale[m] * scales.at(n, 0);
                value = static_cast<float>(dot(codes + m * K, w + n * K, K)) * scale;
            }
            if (bias.values) value = value + bias.at(n);
            store(y, y_type, m * N + n, value);
        }
    }
}

// A token in float64: what its elements are, and what its integers of 31 bits lose of them.
inline void measure_token(const void *x, int32_t x_type, int64_t first, int64_t K, double *values, double *lost) {
    const float most = absmax(x, x_type, first, K);
    int exponent = -148;
    while (static_cast<double>(most) >= pow2(exponent)) ++exponent;
    for (int64_t k = 0; k < K; ++k) {
        values[k] = static_cast<double>(load(x, x_type, first + k));
        const double error = values[k] - round_even(values[k] * pow2(30 - exponent)) * pow2(exponent - 30);
        lost[k] = error < 0 ? -error : error;
    }
}

// One output of bk_cpu_linear_f32_t2 in float64, and how far the specification lets the result lie from it.
struct Interval {
    double value, tolerance;
};

inline Interval linear_f32(const double *x, const double *lost, const int8_t *w, const Scales &scales, const Bias &bias,
                           int64_t n, int64_t K) {
    const int64_t groups = scales.columns ? scales.columns : 1;
    const int64_t width = K / groups;
    double value = 0.0, error = 0.0, size = 0.0;
    for (int64_t g = 0; g < groups; ++g) {
        const double scale = scales.factor(n, g) * static_cast<double>(scales.at(n, g));
        double sum = 0.0, sum_lost = 0.0, sum_size = 0.0;
        for (int64_t k = g * width; k < (g + 1) * width; ++k) {
            if (w[k] == 0) continue;
            sum += w[k] * x[k];
            sum_lost += lost[k];
            sum_size += x[k] < 0 ? -x[k] : x[k];
        }
        value += sum * scale;
        error += sum_lost * scale;
        size += sum_size * scale;
    }
    if (bias.values) {
        const double term = static_cast<double>(bias.at(n));
        value += term;
        size += term < 0 ? -term : term;
    }
    // Every addition rounds here; every group does in the kernel.
    return {value, error + size * static_cast<double>(K + 2 * groups + 4) * pow2(-52)};
}

// Lane l of `lanes`, each of every `lanes`-th row: the upper half of them is added to the lower one.
inline double lane_of_rows(const double *sums, int64_t rows, int64_t lane, int64_t lanes) {
    const int64_t twice = 2 * lanes;
    if (twice <= 256) return lane_of_rows(sums, rows, lane, twice) + lane_of_rows(sums, rows, lane + lanes, twice);
    double sum = 0.0;
    for (int64_t r = lane; r < rows; r += lanes) sum += sums[r];
    return sum;
}

inline double sum_of_rows(const double *sums, int64_t rows) { return lane_of_rows(sums, rows, 0, 1); }

inline float weight_scale(const double *sums, int64_t rows, int64_t count) {
    const float mean = static_cast<float>(sum_of_rows(sums, rows) / static_cast<double>(count));
    if (!finite(mean)) return nan();
    return mean < 1e-5f ? 1e-5f : mean;
}

// Scales of the groups of a row in two levels.
inline void two_levels(const float *scales, int64_t columns, float *row, uint8_t *multiplier) {
    float most = 0.0f;
    for (int64_t g = 0; g < columns; ++g) {
        if (!(scales[g] <= most)) most = scales[g];
        if (most != most) break;
    }
    *row = most / 127.0f;
    for (int64_t g = 0; g < columns; ++g) {
        const float ratio = scales[g] / *row;
        const double rounded = *row == *row ? round_even(static_cast<double>(ratio)) : 1.0;
        multiplier[g] = static_cast<uint8_t>(rounded < 1.0 ? 1.0 : rounded > 127.0 ? 127.0 : rounded);
    }
}

// The sum of |w| in the order that bitkernels.h fixes.
inline double abs_sum(const void *weight, int32_t type, int64_t first, int64_t count) {
    double lanes[16] = {};
    for (int64_t k = 0; k < count; ++k) lanes[k % 16] += static_cast<double>(absolute(load(weight, type, first + k)));
    double sum = 0.0;
    for (double lane : lanes) sum += lane;
    return sum;
}

// Of a number above zero; a float32 that comes of it shows in one of 2^28 that its last bit may be wrong.
inline double square_root(double value) {
    double root = value < 1.0 ? 1.0 : value;
    for (double next = 0.5 * (root + value / root); next < root; next = 0.5 * (root + value / root)) root = next;
    return root;
}

// Writes the gradient of `count` elements that share a learned step; returns the sum of their terms.
inline double learned(const void *dw, int32_t dw_type, const void *weight, int32_t type, float step, void *gradient,
                      int64_t first, int64_t count) {
    double lanes[16] = {};
    for (int64_t k = 0; k < count; ++k) {
        const float g = load(dw, dw_type, first + k);
        const float v = load(weight, type, first + k) * (1.0f / step);
        const bool inside = absolute(v) < 1.5f;
        const float code = v > 0.5f ? 1.0f : v < -0.5f ? -1.0f : v != v ? v : 0.0f;
        store(gradient, type, first + k, inside ? g : 0.0f);
        lanes[k % 16] += static_cast<double>((inside ? code - v : code) * g);
    }
    double sum = 0.0;
    for (double lane : lanes) sum += lane;
    return sum;
}

inline int8_t ternarize(float weight, float scale) {
    const float value = weight * (1.0f / scale);
    // Half to even: both halves go to 0.
    return static_cast<int8_t>((value > 0.5f) - (value < -0.5f));
}

// w is int8 [N, K]; padding gets the code `padding` plus 1.
inline void pack(const int8_t *w, uint8_t *qweight, int64_t N, int64_t K, int padding) {
    const int64_t R = (N + 3) / 4;
    for (int64_t r = 0; r < R; ++r) {
        for (int64_t k = 0; k < K; ++k) {
            unsigned byte = 0;
            for (int64_t i = 0; i < 4; ++i) {
                const int64_t n = r + i * R;
                byte |= static_cast<unsigned>((n < N ? w[n * K + k] : padding) + 1) << (2 * i);
            }
            qweight[r * K + k] = static_cast<uint8_t>(byte);
        }
    }
}

}  // namespace reference

#endif
