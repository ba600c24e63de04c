// What linear.cpp shares with experts.cpp: how tokens become codes, and how packed rows are handed to an instruction
// set.
#ifndef BITLAB_CPU_LINEAR_H
#define BITLAB_CPU_LINEAR_H

#include "common.h"

namespace bitlab {

extern const char *const kWrongTypes;

// How one call's tokens become codes.
struct QuantizeArgs {
    const void *x;
    int32_t type;
    int64_t stride, M, K, padded_to, columns, planes;
    bool per_tensor;
};

// max|x| of one token.
float absmax_token(const Kernels &kernels, const QuantizeArgs &args, int64_t m);

// The larger of two max|x|; what is not finite stays.
inline float larger(float most, float other) { return most <= other || other != other ? other : most; }

// One token's codes, scale and sums. `most` is what counts as its max|x|.
void quantize_token(const Kernels &kernels, const QuantizeArgs &args, float most, int8_t *codes, float *scale,
                    int32_t *sums, int64_t m);

inline int64_t blocks(int64_t N) { return ((N + 3) / 4 + kBlock - 1) / kBlock; }

// Packed rows in whole blocks, so that every thread writes whole runs of outputs.
void linear_blocks(const Kernels &kernels, const LinearArgs &args, Scratch *scratch, int64_t first, int64_t last,
                   int64_t thread);

bool valid_types(const bk_linear_args &call);

// x: the codes of the tokens that are multiplied with the weights of `call`.
LinearArgs linear_args(const bk_linear_args &call, const Activations &x);

}  // namespace bitlab

#endif
