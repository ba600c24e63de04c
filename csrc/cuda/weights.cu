#include "weights.cuh"

#include <math.h>

#include "common.h"

namespace bitlab {
namespace {

int32_t pack_params(const Shape &shape, const void *weight, int32_t type, const float *scale, int64_t scale_rows,
                    int64_t scale_columns, const uint8_t *multiplier, uint8_t *qweight, PackParams &params) {
    BK_CUDA_TRY(check_shape(shape, scale_rows, scale_columns, 16));
    BK_CUDA_TRY(check_multiplier(shape, multiplier, scale_columns));
    BK_CUDA_TRY(check_tensor(shape, "weight", weight, type));
    BK_CUDA_TRY(check_tensor(shape, "weight_scale", scale, BK_CUDA_F32));
    const int64_t columns = scale_columns ? scale_columns : 1;
    params = {weight,
              type,
              scale,
              scale_rows == 1 ? 1 : 2,
              static_cast<int32_t>(columns),
              multiplier,
              qweight,
              shape.N,
              ceil_div(shape.N, 4),
              static_cast<int32_t>(shape.K),
              static_cast<int32_t>(shape.K / columns),
              aligned(weight, shape.K * size_of(type), 16) && aligned(qweight, shape.K, 8)};
    return BK_CUDA_OK;
}

}  // namespace
}  // namespace bitlab

using namespace bitlab;

extern "C" {

int32_t bk_cuda_weight_scale(const void *weight, int32_t weight_type, float *weight_scale, int64_t scale_rows,
                             int64_t scale_columns, double *row_sums, int64_t N, int64_t K, void *stream) {
    const Shape shape = {"bk_cuda_weight_scale", 0, N, K};
    BK_CUDA_TRY(check_shape(shape, scale_rows, scale_columns, 16));
    BK_CUDA_TRY(check_tensor(shape, "weight", weight, weight_type));
    BK_CUDA_TRY(check_tensor(shape, "weight_scale", weight_scale, BK_CUDA_F32));
    const int64_t columns = scale_columns ? scale_columns : 1;
    const bool per_tensor = scale_rows == 1 && scale_columns == 0 && row_sums;
    if (scale_rows == 1 && scale_columns == 0 && N > 1 && !row_sums) {
        return fail(BK_CUDA_INVALID_ARGUMENT, "%s: row_sums must be given for a scale per tensor, got null", shape.op);
    }
    WeightScaleParams p = {weight,      weight_type,  static_cast<int32_t>(K / columns),
                           N * columns, weight_scale, per_tensor ? row_sums : nullptr,
                           N * K};
    const int64_t blocks = ceil_div(p.parts, kWeightThreads / kChains);
    BK_CUDA_TRY(launched(shape, launch(part_sums_kernel, Grid{blocks, 1}, kWeightThreads, 0, stream, p)));
    if (!per_tensor) return BK_CUDA_OK;
    return launched(shape, launch(sum_rows_kernel, Grid{1, 1}, kWeightThreads, 8 * kWeightThreads, stream, p));
}

int32_t bk_cuda_learned_gradients(const void *dw, int32_t dw_type, const void *weight, int32_t weight_type,
                                  const float *step, int64_t scale_rows, int64_t scale_columns, void *gradient,
                                  float *step_gradient, double *row_sums, int64_t N, int64_t K, void *stream) {
    const Shape shape = {"bk_cuda_learned_gradients", 0, N, K};
    BK_CUDA_TRY(check_shape(shape, scale_rows, scale_columns, 1));
    BK_CUDA_TRY(check_tensor(shape, "dw", dw, dw_type));
    BK_CUDA_TRY(check_tensor(shape, "weight", weight, weight_type));
    BK_CUDA_TRY(check_tensor(shape, "step", step, BK_CUDA_F32));
    BK_CUDA_TRY(check_tensor(shape, "gradient", gradient, weight_type));
    BK_CUDA_TRY(check_tensor(shape, "step_gradient", step_gradient, BK_CUDA_F32));
    const bool per_tensor = scale_rows == 1 && scale_columns == 0;
    if (per_tensor && !row_sums) {
        return fail(BK_CUDA_INVALID_ARGUMENT, "%s: row_sums must be given for a step per tensor, got null", shape.op);
    }
    const int64_t columns = scale_columns ? scale_columns : 1;
    const int64_t elements = per_tensor ? N * K : K / columns;
    LearnedParams p = {dw,
                       dw_type,
                       weight,
                       weight_type,
                       step,
                       gradient,
                       step_gradient,
                       per_tensor ? row_sums : nullptr,
                       N * columns,
                       static_cast<int32_t>(K / columns),
                       sqrt(static_cast<double>(elements))};
    const int64_t blocks = ceil_div(p.parts, kWeightThreads / kChains);
    BK_CUDA_TRY(launched(shape, launch(learned_kernel, Grid{blocks, 1}, kWeightThreads, 0, stream, p)));
    if (!per_tensor) return BK_CUDA_OK;
    return launched(shape, launch(learned_rows_kernel, Grid{1, 1}, kWeightThreads, 8 * kWeightThreads, stream, p));
}

int32_t bk_cuda_pack_t2(const void *weight, int32_t weight_type, const float *weight_scale, int64_t scale_rows,
                        int64_t scale_columns, uint8_t *qweight, int64_t N, int64_t K, void *stream) {
    const Shape shape = {"bk_cuda_pack_t2", 0, N, K};
    PackParams p;
    BK_CUDA_TRY(pack_params(shape, weight, weight_type, weight_scale, scale_rows, scale_columns, nullptr, qweight, p));
    return launched(shape, launch(pack_kernel, Grid{p.rows, 1}, kWeightThreads, 0, stream, p));
}

int32_t bk_cuda_pack_groups_t2(const void *weight, int32_t weight_type, float *weight_scale, uint8_t *multiplier,
                               uint8_t *qweight, int64_t N, int64_t K, int64_t columns, void *stream) {
    const Shape shape = {"bk_cuda_pack_groups_t2", 0, N, K};
    if (!multiplier) return fail(BK_CUDA_INVALID_ARGUMENT, "%s: multiplier must be given, got null", shape.op);
    PackGroupsParams p = {{}, weight_scale, multiplier};
    BK_CUDA_TRY(pack_params(shape, weight, weight_type, weight_scale, N, columns, multiplier, qweight, p.pack));
    return launched(shape, launch(pack_groups_kernel, Grid{p.pack.rows, 1}, kWeightThreads,
                                  pack_groups_shared_bytes(columns), stream, p));
}

int32_t bk_cuda_unpack_t2(const uint8_t *qweight, const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                          const uint8_t *multiplier, void *weight, int32_t weight_type, int64_t N, int64_t K,
                          void *stream) {
    const Shape shape = {"bk_cuda_unpack_t2", 0, N, K};
    PackParams p;
    BK_CUDA_TRY(pack_params(shape, weight, weight_type, weight_scale, scale_rows, scale_columns, multiplier,
                            const_cast<uint8_t *>(qweight), p));
    return launched(shape, launch(unpack_kernel, Grid{p.rows, 1}, kWeightThreads, 0, stream, p));
}

}  // extern "C"
