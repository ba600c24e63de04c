// Which kernel multiplies, and where its memory lies: the host side of few.cuh, many.cuh, wgmma.cuh and matmul.cuh.
#ifndef BITLAB_CUDA_MATMUL_H
#define BITLAB_CUDA_MATMUL_H

#include "common.h"

namespace bitlab {

struct MatmulParams;
struct PlaceParams;

// The most tokens of few_kernel.
constexpr int kFewTokens = 16;

struct Plan {
    bool few;         // few_kernel, else many_kernel
    bool wgmma;       // wgmma_kernel instead
    int tiles;        // kTiles of the kernel; kGroups of wgmma_kernel
    bool grouped;     // a float32 scale for each group
    bool multiplied;  // an integer multiplier for each group, and one scale for each output
    int splits;       // over K
    Grid grid;
};

// What the weights' scales are: K / group size columns or 0, each a float32 scale or, `multiplied`, an integer.
struct Groups {
    int64_t columns;
    bool multiplied;
};

struct Weights {
    const void *weight;
    const float *scale;
    int64_t scale_rows, scale_columns;
    const uint8_t *multiplier;  // [N, scale_columns], or null
    const void *bias;
    int32_t bias_type;

    Groups groups() const { return {scale_columns, multiplier != nullptr}; }
    bool grouped() const { return scale_columns > 0 && !multiplier; }
};

struct Output {
    void *y;
    int32_t y_type;
};

inline bool is_vector(const void *x, int32_t type, int64_t stride) { return aligned(x, stride * size_of(type), 16); }

// BK_CUDA_OK, or a failure that says what is wrong with the arguments of a linear layer.
int32_t check_linear(const Shape &shape, const Weights &weights, const Output &output, const void *workspace,
                     int32_t multiprocessors);

// What does not depend on the plan, nor on where the tokens are.
MatmulParams params_of(bk_cuda_product product, const Shape &shape, const Weights &weights, const Output &output);

// How multipliers are placed as `words`.
PlaceParams place_params(const Shape &shape, const Weights &weights, uint32_t *words);

// How a product of this shape is computed, with wgmma where it pays if the device and the weights' rows allow it; a
// function of the arguments alone.
Plan plan_matmul(bk_cuda_product product, int64_t M, int64_t N, int64_t K, Groups groups, int multiprocessors,
                 bool wgmma);

// Queues the plan's kernels, one for each kind of arithmetic in a file of its own (they take long to compile).
const char *run_ternary_int8(const Plan &plan, const MatmulParams &params, void *stream);
const char *run_multiplied_int8(const Plan &plan, const MatmulParams &params, void *stream);
const char *run_int8_int8(const Plan &plan, const MatmulParams &params, void *stream);
const char *run_ternary_16(const Plan &plan, const MatmulParams &params, bool is_bf16, void *stream);
const char *run_ternary_f32(const Plan &plan, const MatmulParams &params, void *stream);
const char *run_multiplied_float(const Plan &plan, const MatmulParams &params, int32_t x_type, void *stream);

// Queues wgmma_kernel, the part of run_ternary_int8 and run_multiplied_int8 that only some architectures have.
const char *run_wgmma(const Plan &plan, const MatmulParams &params, void *stream);

}  // namespace bitlab

#endif
