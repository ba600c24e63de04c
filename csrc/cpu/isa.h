// What an instruction set provides: the table that api.cpp dispatches through.
#ifndef BITLAB_CPU_ISA_H
#define BITLAB_CPU_ISA_H

#include <stdint.h>

namespace bitlab {

// Token codes are padded with zeros to a multiple of this, so that vector loops need no tail on the activations.
constexpr int64_t kPadK = 64;
// Packed rows that one task of the linear kernel handles; their outputs are written as four contiguous runs.
constexpr int64_t kRowBlock = 16;

constexpr int64_t padded(int64_t K) { return (K + kPadK - 1) / kPadK * kPadK; }

struct Activations {
    const int8_t *codes;  // [M, padded(K)]
    const float *scale;   // [M]
    const int32_t *sums;  // [M, columns]: the sum of the codes of each group of K
    int64_t columns;      // groups along K; 1 unless the weight scales are per group
};

struct LinearArgs {
    Activations x;
    const uint8_t *qweight;
    const float *weight_scale;
    int64_t scale_rows;
    bool grouped;  // weight_scale is [N, x.columns]
    const void *bias;
    int32_t bias_type;
    void *y;
    int32_t y_type;
    int64_t M, N, K;
};

struct Kernels {
    const char *name;
    bool (*supported)();
    // Returns max|x| of a row; NaN if the row holds NaN.
    float (*absmax)(const void *x, int32_t type, int64_t K);
    // codes[0..K) = clamp(round(x * a)), zeros up to padded_to; sums[c] = the sum over the c-th of `columns` parts of
    // K.
    void (*quantize)(const void *x, int32_t type, float a, int64_t K, int64_t padded_to, int8_t *codes, int32_t *sums,
                     int64_t columns);
    // The fused linear for packed rows [first, last).
    void (*linear)(const LinearArgs &args, int64_t first, int64_t last);
    // Exact integer sums for packed rows [first, last); acc is [M, N].
    void (*matmul)(const LinearArgs &args, int32_t *acc, int64_t first, int64_t last);
    // float64 sum of |w| over count elements, in the order that bitkernels.h fixes.
    double (*abs_sum)(const void *weight, int32_t type, int64_t offset, int64_t count);
    // Ternarizes packed row r; inverse scales are computed from weight_scale.
    void (*pack_row)(const void *weight, int32_t type, const float *weight_scale, int64_t scale_rows,
                     int64_t scale_columns, uint8_t *qweight, int64_t N, int64_t K, int64_t r);
};

extern const Kernels kKernelsPortable;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512Vnni;
#endif

}  // namespace bitlab

#endif
