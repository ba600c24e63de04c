/*
 * BitLab's CUDA kernels: the contract of libbitkernels_cuda.
 *
 * Conventions, true of every function here:
 *   - Shapes, the packed format t2, scales and the order of float operations are those of bitkernels.h.
 *   - x, qweight, scales, bias, y, codes and workspace are device memory of the current device and belong to the
 * caller; nothing is allocated and nothing is kept. Inputs, outputs and workspace must not overlap. No alignment is
 * needed beyond that of the element type, but for workspace: 256 bytes. Rows of x and of weights that are aligned to 16
 *     bytes are read in 16-byte loads, others byte by byte, slower and just as right.
 *   - Work is queued on `stream` (a cudaStream_t; null is the default stream) and never waited for, so every function
 *     can be captured in a CUDA graph. Values are never looked at on the host.
 *   - multiprocessors is the device's number of them; how K is split among blocks depends on it and on the shape alone.
 *     Integer sums do not depend on the split; float ones do, to their rounding.
 *   - A function returns BK_CUDA_OK, or a status with a text in bk_cuda_last_error() of the same thread, which holds
 *     the shapes and, where a launch failed, CUDA's own text. Nothing is printed or thrown.
 *   - Every function may be called from several threads at once.
 */
#ifndef BITKERNELS_CUDA_H
#define BITKERNELS_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BK_CUDA_ABI_VERSION 6
#define BK_CUDA_API __attribute__((visibility("default")))

/* Largest K: a sum of K products of the int8 code -128 and the byte 128 still fits int32. */
#define BK_CUDA_MAX_IN_FEATURES 131071

typedef enum { BK_CUDA_OK = 0, BK_CUDA_INVALID_ARGUMENT = 1, BK_CUDA_LAUNCH_FAILED = 2 } bk_cuda_status;

/* Element types. Float tensors are of the first three. */
typedef enum { BK_CUDA_F32 = 0, BK_CUDA_BF16 = 1, BK_CUDA_F16 = 2, BK_CUDA_I32 = 3, BK_CUDA_I8 = 4 } bk_cuda_type;

/* What a linear call does, for bk_cuda_linear_workspace. */
typedef enum {
    BK_CUDA_I8_T2 = 0,  /* int8 activations, ternary weights; the exact product too */
    BK_CUDA_I8_I8 = 1,  /* int8 activations, int8 weights */
    BK_CUDA_F16_T2 = 2, /* bfloat16 or float16 activations as they are, ternary weights */
    BK_CUDA_F32_T2 = 3  /* float32 activations as they are, ternary weights */
} bk_cuda_product;

/* Returns BK_CUDA_ABI_VERSION as it was when the library was compiled. */
BK_CUDA_API int32_t bk_cuda_abi_version(void);

/* Returns the text of this thread's last failure; never null. */
BK_CUDA_API const char *bk_cuda_last_error(void);

/* Returns the architectures compiled in, such as "sm_80 sm_90a compute_90". */
BK_CUDA_API const char *bk_cuda_architectures(void);

/*
 * Returns the bytes of workspace that a linear or matmul call needs; scale_columns is K / group size, or 0; multiplied:
 * whether the call has a multiplier.
 */
BK_CUDA_API int64_t bk_cuda_linear_workspace(int32_t product, int64_t M, int64_t N, int64_t K, int64_t scale_columns,
                                             int32_t multiplied, int32_t multiprocessors);

/*
 * Scales of groups. Either one float32 scale for each group, weight_scale [N, K / G]; or two levels: a multiplier,
 * uint8 [N, K / G] of 0 to 127, contiguous, and weight_scale [N], with scale_rows N and scale_columns K / G as above; G
 * is 64 or 128. A weight is then code * multiplier * weight_scale, the sum of the products of codes and multipliers is
 * an exact int32 (|sum| <= 128 * 127 * 131071 < 2^31, whatever wraps around on the way), and all else is as with one
 * scale for each output. A multiplier above 127 gives wrong results.
 */

/*
 * y = x_q @ w_q.T * (x_scale * weight_scale) + bias: int8 activations, ternary weights; see bk_cpu_linear_i8_t2.
 * Outputs in float32 are bit-equal to the CPU's and the reference's.
 *
 *   x            [M, K] of x_type, rows contiguous, x_stride elements from row to row
 *   qweight      uint8 [R, K], contiguous
 *   weight_scale float32: [1] (scale_rows 1, scale_columns 0), [N] (N, 0) or [N, K / G] (N, K / G; G a multiple of 64)
 *   multiplier   uint8 [N, K / G] and weight_scale [N], see above; or null
 *   bias         [N] of bias_type, or null
 *   y            [M, N] of y_type, contiguous
 *   workspace    bk_cuda_linear_workspace(BK_CUDA_I8_T2, ...) bytes
 */
BK_CUDA_API int32_t bk_cuda_linear_i8_t2(const void *x, int32_t x_type, int64_t x_stride, const uint8_t *qweight,
                                         const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                                         const uint8_t *multiplier, const void *bias, int32_t bias_type, void *y,
                                         int32_t y_type, int64_t M, int64_t N, int64_t K, int32_t per_tensor,
                                         void *workspace, int32_t multiprocessors, void *stream);

/*
 * The same, and what x was quantized to, for a backward pass: x is read once.
 *
 *   codes        int8 [M, K], contiguous, aligned to 16 bytes; K a multiple of 64
 *   x_scale      float32 [M]
 *   Other arguments as in bk_cuda_linear_i8_t2.
 */
BK_CUDA_API int32_t bk_cuda_linear_codes_i8_t2(const void *x, int32_t x_type, int64_t x_stride, const uint8_t *qweight,
                                               const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                                               const uint8_t *multiplier, const void *bias, int32_t bias_type, void *y,
                                               int32_t y_type, int8_t *codes, float *x_scale, int64_t M, int64_t N,
                                               int64_t K, int32_t per_tensor, void *workspace, int32_t multiprocessors,
                                               void *stream);

/*
 * y = x @ (w_q * weight_scale).T + bias: ternary weights, activations as they are.
 *
 * 16-bit activations are multiplied by the codes on tensor cores with float32 sums. A float32 activation is three
 * bfloat16 numbers whose sum it is, exactly but for bits below 2^-133; each is multiplied, into the same float32 sum.
 * Codes, with multipliers too, and products are exact, so the error is that of a float32 sum, in the order of the
 * tensor cores. Scales and bias are applied in float32, then the result is rounded once to y's type. A token with NaN
 * or infinity gives NaN or infinity.
 *
 *   Arguments as in bk_cuda_linear_i8_t2.
 *   workspace    bk_cuda_linear_workspace(BK_CUDA_F16_T2 or BK_CUDA_F32_T2, ...) bytes
 */
BK_CUDA_API int32_t bk_cuda_linear_float_t2(const void *x, int32_t x_type, int64_t x_stride, const uint8_t *qweight,
                                            const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                                            const uint8_t *multiplier, const void *bias, int32_t bias_type, void *y,
                                            int32_t y_type, int64_t M, int64_t N, int64_t K, void *workspace,
                                            int32_t multiprocessors, void *stream);

/*
 * Returns the bytes of workspace that bk_cuda_experts_i8_t2 needs; scale_columns is K / group size, or 0; multiplied
 * and per_tensor: whether the call has a multiplier, and one activation scale for the tokens of an expert.
 */
BK_CUDA_API int64_t bk_cuda_experts_workspace(int64_t M, int64_t choices, int64_t experts, int64_t N, int64_t K,
                                              int64_t scale_columns, int32_t multiplied, int32_t per_tensor);

/*
 * y[s] = what bk_cuda_linear_i8_t2 gives for token s / choices and the weights of expert index[s]; zeros for none; see
 * bk_cpu_experts_i8_t2.
 *
 * All experts of a layer in two or three launches (per_tensor: one more), whose grids depend on the sizes alone: tokens
 * are sorted by expert on the device, a token's codes are made once, and the weights of experts without tokens are not
 * read. The result has the same bits as a call for each expert.
 *
 *   index        int64 [M * choices], contiguous: the expert of each row of y; any number that is not one is none
 *   choices      rows of y that each token has, one after the other; M * choices < 2^31
 *   experts      how many there are, at most 8192
 *   qweight, weight_scale, multiplier, bias: as in bk_cuda_linear_i8_t2, those of all experts one after the other
 *   y            [M * choices, N] of y_type, contiguous; N at most 4194240
 *   workspace    bk_cuda_experts_workspace(...) bytes
 */
BK_CUDA_API int32_t bk_cuda_experts_i8_t2(const void *x, int32_t x_type, int64_t x_stride, const int64_t *index,
                                          int64_t choices, int64_t experts, const uint8_t *qweight,
                                          const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                                          const uint8_t *multiplier, const void *bias, int32_t bias_type, void *y,
                                          int32_t y_type, int64_t M, int64_t N, int64_t K, int32_t per_tensor,
                                          void *workspace, void *stream);

/*
 * y = x_q @ qweight.T * (x_scale * weight_scale) + bias with int8 weights, for output heads; see bk_cpu_linear_i8_i8.
 *   qweight      int8 [N, K], contiguous, -127 to 127
 *   weight_scale float32 [N]
 *   workspace    bk_cuda_linear_workspace(BK_CUDA_I8_I8, ...) bytes
 */
BK_CUDA_API int32_t bk_cuda_linear_i8_i8(const void *x, int32_t x_type, int64_t x_stride, const int8_t *qweight,
                                         const float *weight_scale, const void *bias, int32_t bias_type, void *y,
                                         int32_t y_type, int64_t M, int64_t N, int64_t K, void *workspace,
                                         int32_t multiprocessors, void *stream);

/* Bytes of workspace of bk_cuda_quantize_i8 with per_tensor; else none is needed. */
#define BK_CUDA_QUANTIZE_WORKSPACE 4096

/*
 * Quantizes activations as bk_cuda_linear_i8_t2 does; see bk_cpu_quantize_i8.
 *   x     [M, K] of x_type, rows contiguous, x_stride elements from row to row
 *   codes int8 [M, K], contiguous; scale float32 [M]
 */
BK_CUDA_API int32_t bk_cuda_quantize_i8(const void *x, int32_t x_type, int64_t x_stride, int8_t *codes, float *scale,
                                        int64_t M, int64_t K, int32_t per_tensor, void *workspace, void *stream);

/*
 * acc = codes @ w_q.T, exact.
 *   codes int8 [M, K], contiguous; qweight uint8 [R, K]; acc int32 [M, N], contiguous
 *   workspace: bk_cuda_linear_workspace(BK_CUDA_I8_T2, M, N, K, 0, multiprocessors) bytes
 */
BK_CUDA_API int32_t bk_cuda_matmul_i8_t2_i32(const int8_t *codes, const uint8_t *qweight, int32_t *acc, int64_t M,
                                             int64_t N, int64_t K, void *workspace, int32_t multiprocessors,
                                             void *stream);

/*
 * dx = dy @ (w_q * weight_scale), through packed weights.
 *
 * A scale per tensor multiplies the float32 sum; other scales multiply dy first, multipliers the codes. dy, or that
 * product, goes to the tensor cores as bfloat16 or float16 where dy has this type (float16 with a scale per tensor
 * only), else as three bfloat16 numbers whose sum it is; sums are float32, and dx is rounded once.
 *
 *   dy [M, N] of dy_type, rows contiguous, dy_stride elements from row to row; dx [M, K] of dx_type, contiguous
 *   qweight, weight_scale, scale_rows, scale_columns, multiplier: as in bk_cuda_linear_i8_t2
 */
BK_CUDA_API int32_t bk_cuda_input_gradient(const void *dy, int32_t dy_type, int64_t dy_stride, const uint8_t *qweight,
                                           const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                                           const uint8_t *multiplier, void *dx, int32_t dx_type, int64_t M, int64_t N,
                                           int64_t K, void *stream);

/*
 * Absmean scales, the CPU's bits: see bk_cpu_weight_scale for the order of the float64 sums.
 *   weight       [N, K] of weight_type, contiguous
 *   weight_scale float32 [1], [N] or [N, K / G] by (scale_rows, scale_columns), G a multiple of 16
 *   row_sums     float64 [N], gets the sums of the rows for scale_rows == 1; else unused, may be null
 */
BK_CUDA_API int32_t bk_cuda_weight_scale(const void *weight, int32_t weight_type, float *weight_scale,
                                         int64_t scale_rows, int64_t scale_columns, double *row_sums, int64_t N,
                                         int64_t K, void *stream);

/*
 * The gradients of a weight and of its learned scale, the CPU's bits: see bk_cpu_learned_gradients.
 *   dw, weight    [N, K] of dw_type and weight_type, contiguous
 *   step          float32 [1], [N] or [N, K / G] by (scale_rows, scale_columns)
 *   gradient      [N, K] of weight_type, contiguous
 *   step_gradient float32, as step
 *   row_sums      float64 [N], gets the sums of the rows for (1, 0); else unused, may be null
 */
BK_CUDA_API int32_t bk_cuda_learned_gradients(const void *dw, int32_t dw_type, const void *weight, int32_t weight_type,
                                              const float *step, int64_t scale_rows, int64_t scale_columns,
                                              void *gradient, float *step_gradient, double *row_sums, int64_t N,
                                              int64_t K, void *stream);

/*
 * Ternarizes and packs, the CPU's bits: see bk_cpu_pack_t2.
 *   weight [N, K] of weight_type, contiguous; weight_scale as bk_cuda_weight_scale wrote it
 *   qweight uint8 [R, K], contiguous
 */
BK_CUDA_API int32_t bk_cuda_pack_t2(const void *weight, int32_t weight_type, const float *weight_scale,
                                    int64_t scale_rows, int64_t scale_columns, uint8_t *qweight, int64_t N, int64_t K,
                                    void *stream);

/*
 * Absmean scales of groups in two levels, and packing, with one read of the weight from memory; the CPU's bits.
 *
 * With s the absmean scale of a group (bk_cuda_weight_scale): weight_scale = max s of the row / 127, multiplier =
 * clamp(round(s / weight_scale), 1, 127), and codes are those of the step float(multiplier) * weight_scale. A row with
 * NaN or infinity has weight_scale NaN, multipliers 1 and codes 0.
 *   weight       [N, K] of weight_type, contiguous
 *   weight_scale float32 [N]; multiplier uint8 [N, columns]; qweight uint8 [R, K], contiguous
 *   columns      K / G, G 64 or 128
 */
BK_CUDA_API int32_t bk_cuda_pack_groups_t2(const void *weight, int32_t weight_type, float *weight_scale,
                                           uint8_t *multiplier, uint8_t *qweight, int64_t N, int64_t K, int64_t columns,
                                           void *stream);

/*
 * Unpacks: codes (times multipliers) times weight_scale, one float32 product, rounded to weight_type.
 *   qweight uint8 [R, K], contiguous; weight_scale and multiplier as bk_cuda_linear_i8_t2 takes them
 *   weight  [N, K] of weight_type, contiguous
 */
BK_CUDA_API int32_t bk_cuda_unpack_t2(const uint8_t *qweight, const float *weight_scale, int64_t scale_rows,
                                      int64_t scale_columns, const uint8_t *multiplier, void *weight,
                                      int32_t weight_type, int64_t N, int64_t K, void *stream);

#ifdef __cplusplus
}
#endif

#endif
