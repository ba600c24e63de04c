/*
 * BitLab's native kernels: the one public contract.
 *
 * Conventions, true of every function here:
 *   - Shapes: M tokens, N out_features, K in_features; all sizes are int64_t and count elements.
 *   - The packed format is t2: qweight is uint8 [R, K] with R = ceil(N / 4); bits 2i and 2i+1 of qweight[r, k] hold
 *     code[r + i * R, k] + 1 for i = 0..3. Rows past N are padding: written as code 0, never read.
 *   - A scale multiplies codes to give reals.
 *   - Memory belongs to the caller; nothing is kept. Inputs and outputs must not overlap. No alignment is needed beyond
 *     that of the element type.
 *   - A function returns BK_OK, or a status with a text in bk_cpu_last_error() of the same thread; then the outputs
 * hold nothing of value. Nothing is printed, thrown or allocated.
 *   - Every function may be called from several threads at once. num_threads is the most OpenMP threads to use; in a
 *     forked child, where the OpenMP pool does not exist, one is used.
 */
#ifndef BITKERNELS_H
#define BITKERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BK_ABI_VERSION 8
#define BK_API __attribute__((visibility("default")))

/* Largest K: a sum of K products of the int8 code -128 and the byte 128 still fits int32. */
#define BK_MAX_IN_FEATURES 131071

typedef enum { BK_OK = 0, BK_INVALID_ARGUMENT = 1, BK_UNAVAILABLE = 2 } bk_status;

/* Element types of float tensors. */
typedef enum { BK_F32 = 0, BK_BF16 = 1, BK_F16 = 2 } bk_type;

/* Returns BK_ABI_VERSION as it was when the library was compiled. */
BK_API int32_t bk_cpu_abi_version(void);

/* Returns the text of this thread's last failure; never null. */
BK_API const char *bk_cpu_last_error(void);

/* Returns the names of the instruction sets compiled in that this CPU can run, best first, separated by commas. */
BK_API const char *bk_cpu_supported_isas(void);

/* Returns the name of the instruction set in use. */
BK_API const char *bk_cpu_isa(void);

/*
 * Selects an instruction set for all later calls of the process.
 *   name: one of bk_cpu_supported_isas(), or "auto" for the best.
 * Returns BK_UNAVAILABLE, changing nothing, if the CPU or this build lacks it. Not to be called while kernels run.
 */
BK_API int32_t bk_cpu_select_isa(const char *name);

/* Codes that one element becomes where activations are not quantized: see bk_cpu_linear_f32_t2. */
#define BK_FLOAT_PLANES 4

/*
 * Returns the bytes of workspace that a linear or matmul call needs.
 *   scale_columns: K / G for scales of groups, else 0.
 *   planes:        1, or BK_FLOAT_PLANES for bk_cpu_linear_f32_t2.
 */
BK_API int64_t bk_cpu_linear_workspace(int64_t M, int64_t K, int64_t scale_columns, int32_t planes,
                                       int32_t num_threads);

/*
 * What the linear functions take: fields of eight bytes, so that a caller can write them as one record; those that a
 * layer's weights decide come first.
 *
 *   qweight      uint8 [R, K], contiguous
 *   weight_scale float32: [1] (scale_rows 1, scale_columns 0), [N] (N, 0) or [N, K / G] (N, K / G; G a multiple of 64)
 *   multiplier   uint8 [N, K / G], 0 to 127, or null. With it scales of groups are in two levels: G is 64 or 128,
 *                scale_rows N, scale_columns K / G and weight_scale [N]
 *   bias         [N] of bias_type, or null
 *   per_tensor   1 if activations have one scale, else 0: one a token
 *   x            [M, K] of x_type, rows contiguous, x_stride elements from row to row
 *   y            [M, N] of y_type, contiguous
 *   workspace    bk_cpu_linear_workspace(M, K, scale_columns, planes, num_threads) bytes, aligned to 64; planes is 1
 *                unless the function says otherwise
 */
typedef struct {
    const void *qweight;
    const float *weight_scale;
    int64_t scale_rows, scale_columns;
    const uint8_t *multiplier;
    const void *bias;
    int64_t bias_type, N, K, per_tensor;
    const void *x;
    int64_t x_type, x_stride;
    void *y;
    int64_t y_type, M;
    void *workspace;
    int64_t num_threads;
} bk_linear_args;

/*
 * y = x_q @ w_q.T * (x_scale * weight_scale) + bias: int8 activations, ternary weights, one fused call.
 *
 * Activations: m = max(max|x|, 1e-5) over the token, or over x if per_tensor; a = 127 / m;
 * x_q = clamp(round_half_even(x * a), -128, 127); x_scale = m / 127. A token (per_tensor: all) with NaN or infinity
 * gives NaN. Sums are exact int32. Per tensor and per channel: y = float(acc) * (x_scale * weight_scale[n]) + bias[n];
 * with multipliers the same for acc = sum over g of multiplier[n, g] * acc_g, which is exact too;
 * with a scale a group: y = (sum over ascending g of float(acc_g) * weight_scale[n, g]) * x_scale + bias[n]; every
 * operation is rounded in float32 and none is contracted; then one rounding to y's type.
 */
BK_API int32_t bk_cpu_linear_i8_t2(const bk_linear_args *args);

/*
 * y = x @ (w_q * weight_scale).T + bias: ternary weights, activations as they are.
 *
 * Each token becomes integers of 31 bits, x_i = round_half_even(x * 2^(30 - e)) with 2^(e - 1) <= max|x| < 2^e, and
 * these four int8 digits of base 256, whose sums are exact: an element is changed only where its lowest bit is below
 * 2^(e - 30), so 16-bit activations within 2^19 of the token's largest are taken as they are. The sums of a token,
 * exact in int64 with multipliers and without, are scaled (and, with a scale a group, added) in float64, the bias is
 * added in float64, and the result is rounded once to float32 and from there to y's type. It depends neither on
 * num_threads nor on the instruction set. A token with NaN or infinity gives NaN. planes of the workspace:
 * BK_FLOAT_PLANES
 */
BK_API int32_t bk_cpu_linear_f32_t2(const bk_linear_args *args);

/*
 * y = x_q @ w_q.T * (x_scale * weight_scale) + bias with int8 weights, for output heads.
 *
 * Activations are quantized per token as in bk_cpu_linear_i8_t2 and the float operations are those of its per-channel
 * form; sums are exact int32.
 *   qweight      int8 [N, K], contiguous, -127 to 127
 *   weight_scale float32 [N]: scale_rows N, scale_columns 0
 */
BK_API int32_t bk_cpu_linear_i8_i8(const bk_linear_args *args);

/*
 * Returns the bytes of workspace that bk_cpu_experts_i8_t2 needs.
 *   scale_columns: K / G for scales of groups, else 0.
 */
BK_API int64_t bk_cpu_experts_workspace(int64_t M, int64_t choices, int64_t experts, int64_t K, int64_t scale_columns,
                                        int32_t num_threads);

/*
 * What bk_cpu_experts_i8_t2 takes: fields of eight bytes, as those of bk_linear_args.
 *
 *   linear   as bk_cpu_linear_i8_t2 takes it, but qweight, weight_scale, multiplier and bias are those of all experts,
 *            one after the other ([experts, R, K] and so on), y is [M * choices, N], and workspace has
 *            bk_cpu_experts_workspace(M, choices, experts, K, scale_columns, num_threads) bytes, aligned to 64
 *   index    [M * choices]: which expert each row of y is of; any number that is not one of an expert is none
 *   choices  rows of y that each token has, one after the other
 *   experts  how many there are
 */
typedef struct {
    bk_linear_args linear;
    const int64_t *index;
    int64_t choices, experts;
} bk_experts_args;

/*
 * y[s] = what bk_cpu_linear_i8_t2 gives for token s / choices and the weights of expert index[s]; zeros for none.
 *
 * All experts of a layer in one call: the weights of each are read once for all of its tokens, those that have no
 * token are not read, and a token's codes are made once. The result has the same bits as a call for each expert; with
 * per_tensor an expert's tokens have one activation scale.
 */
BK_API int32_t bk_cpu_experts_i8_t2(const bk_experts_args *args);

/*
 * Quantizes activations as bk_cpu_linear_i8_t2 does.
 *   x     [M, K] of x_type, rows contiguous, x_stride elements from row to row
 *   codes int8 [M, K], contiguous; scale float32 [M]
 * A token with NaN or infinity (per_tensor: all tokens) gets codes 0 and a NaN scale.
 */
BK_API int32_t bk_cpu_quantize_i8(const void *x, int32_t x_type, int64_t x_stride, int8_t *codes, float *scale,
                                  int64_t M, int64_t K, int32_t per_tensor, int32_t num_threads);

/*
 * acc = codes @ w_q.T, exact.
 *   codes int8 [M, K], contiguous; qweight uint8 [R, K]; acc int32 [M, N], contiguous
 *   workspace: bk_cpu_linear_workspace(M, K, 0, 1, num_threads) bytes, aligned to 64
 */
BK_API int32_t bk_cpu_matmul_i8_t2_i32(const int8_t *codes, const uint8_t *qweight, int32_t *acc, int64_t M, int64_t N,
                                       int64_t K, void *workspace, int32_t num_threads);

/*
 * Absmean scales: weight_scale = max(mean|W|, 1e-5) over the tensor, the row or the group.
 *
 * Sums are float64 in a fixed order, so the result does not depend on num_threads or the instruction set: lane l of 16
 * adds the elements l, l + 16, ... of a row (or group) in ascending order, and the lanes are added in ascending order.
 * Of the rows, lane l of 256 adds the rows l, l + 256, ... in ascending order, then lanes are added in pairs: l + 128
 * to every l below 128, l + 64 to every l below 64, and so on. The mean is rounded to float32 once; one that is not
 * finite gives NaN.
 *
 *   weight       [N, K] of weight_type, contiguous
 *   weight_scale float32, by (scale_rows, scale_columns): [1] (1, 0), [N] (N, 0) or [N, K / G] (N, K / G; G a multiple
 * of 16) row_sums     float64 [N], gets the sums of the rows for scale_rows == 1; else unused, may be null
 */
BK_API int32_t bk_cpu_weight_scale(const void *weight, int32_t weight_type, float *weight_scale, int64_t scale_rows,
                                   int64_t scale_columns, double *row_sums, int64_t N, int64_t K, int32_t num_threads);

/*
 * Ternarizes and packs: code = clamp(round_half_even(W * (1 / weight_scale)), -1, 1) in float32; NaN gives 0.
 *   weight       [N, K] of weight_type, contiguous
 *   weight_scale as bk_cpu_weight_scale wrote it
 *   qweight      uint8 [R, K], contiguous
 */
BK_API int32_t bk_cpu_pack_t2(const void *weight, int32_t weight_type, const float *weight_scale, int64_t scale_rows,
                              int64_t scale_columns, uint8_t *qweight, int64_t N, int64_t K, int32_t num_threads);

/*
 * Scales of groups in two levels, and packing, in one pass over the weight.
 *
 * With s[n, g] as bk_cpu_weight_scale gives it: weight_scale[n] = max over g of s[n, g] / 127; multiplier[n, g] =
 * clamp(round_half_even(s[n, g] / weight_scale[n]), 1, 127); codes as bk_cpu_pack_t2 gives them for the float32 scales
 * multiplier[n, g] * weight_scale[n]. A row with a NaN scale gets multipliers 1.
 *
 *   weight       [N, K] of weight_type, contiguous
 *   weight_scale float32 [N]
 *   multiplier   uint8 [N, columns]
 *   qweight      uint8 [R, K], contiguous
 *   columns      K / G, G 64 or 128
 */
BK_API int32_t bk_cpu_pack_groups_t2(const void *weight, int32_t weight_type, float *weight_scale, uint8_t *multiplier,
                                     uint8_t *qweight, int64_t N, int64_t K, int64_t columns, int32_t num_threads);

/*
 * The gradients of a weight and of its learned scale from dw, that of codes * step, straight through the rounding.
 *
 * In float32, of every element: v = W * (1 / step); code = clamp(round_half_even(v), -1, 1); gradient = dw where
 * |v| < 1.5, else 0; term = (|v| < 1.5 ? code - v : code) * dw; step_gradient = sum of the terms of the elements that
 * share a step, divided by the square root of their number. The sum, the root and the quotient are float64, and the
 * last is rounded to float32 once. The order of the sum is that of bk_cpu_weight_scale, so the result does not depend
 * on num_threads or the instruction set. Where v is NaN the gradient is 0 and the term NaN; NaN and infinity of dw pass
 * as the formulas say.
 *
 *   dw            [N, K] of dw_type, contiguous
 *   weight        [N, K] of weight_type, contiguous
 *   step          float32, by (scale_rows, scale_columns): [1] (1, 0), [N] (N, 0) or [N, K / G] (N, K / G)
 *   gradient      [N, K] of weight_type, contiguous
 *   step_gradient float32, as step
 *   row_sums      float64 [N], gets the sums of the rows for (1, 0); else unused, may be null
 */
BK_API int32_t bk_cpu_learned_gradients(const void *dw, int32_t dw_type, const void *weight, int32_t weight_type,
                                        const float *step, int64_t scale_rows, int64_t scale_columns, void *gradient,
                                        float *step_gradient, double *row_sums, int64_t N, int64_t K,
                                        int32_t num_threads);

/*
 * Unpacks a block: codes, times multipliers if there are any, times weight_scale, one float32 product, rounded to
 * weight_type.
 *   qweight      uint8 [R, K], contiguous
 *   weight_scale, scale_rows, scale_columns, multiplier  as bk_cpu_linear_i8_t2 takes them
 *   weight       [4, last_row - first_row, last_column - first_column] of weight_type, contiguous: lane i holds the
 * rows i * R + first_row on; rows past N are left as they are. The whole matrix is rows [0, R), columns [0, K).
 */
BK_API int32_t bk_cpu_unpack_t2(const uint8_t *qweight, const float *weight_scale, int64_t scale_rows,
                                int64_t scale_columns, const uint8_t *multiplier, void *weight, int32_t weight_type,
                                int64_t N, int64_t K, int64_t first_row, int64_t last_row, int64_t first_column,
                                int64_t last_column, int32_t num_threads);

/*
 * Finds the first packed matrix in which any of the four codes of any byte is 3, which no writer produces. One call
 * for all matrices of a file: threads meet once, not once a matrix.
 *   qweights  `matrices` pointers to uint8 [counts[i]]
 *   counts    int64 [matrices]
 *   found     its index, or -1
 */
BK_API int32_t bk_cpu_find_invalid_t2(const uint8_t *const *qweights, const int64_t *counts, int64_t matrices,
                                      int64_t *found, int32_t num_threads);

#ifdef __cplusplus
}
#endif

#endif
