// The linear layers: quantize, multiply, finish; which kernels do it is decided here, from the shape alone.
#include "activations.cuh"
#include "few.cuh"
#include "fused.cuh"
#include "gemv.cuh"
#include "many.cuh"
#include "matmul.h"
#include "wgmma.cuh"

namespace bitlab {
namespace {

// A share of K that is worth a block of its own, in blocks of 64 columns.
constexpr int64_t kFewShare = 16, kManyShare = 8, kWgmmaShare = 16;
constexpr int64_t kMaxSplits = 64;
// What fused_kernel's step costs beside its blocks of 64 columns, in those of a warp; and the bytes of packed weights,
// each tile of tokens by itself, that it reads from L2 before three launches are as fast. Reasoned, not measured.
constexpr int64_t kFusedStepBlocks = 2, kFusedTraffic = 32 << 20;
// The fewest tokens for wgmma_kernel, whose tiles have 64.
constexpr int64_t kLeastWgmmaTokens = kFewTokens + 1;

int64_t weight_rows(bk_cuda_product product, int64_t N) { return product == BK_CUDA_I8_I8 ? N : ceil_div(N, 4); }

// The parts of a workspace, in bytes from its beginning.
struct Workspace {
    int64_t x, sums, scale, maxima, multipliers, partial, bytes;
};

Workspace lay_out(bk_cuda_product product, int64_t M, int64_t N, int64_t K, Groups groups, const Plan &plan) {
    const bool integer = product == BK_CUDA_I8_T2 || product == BK_CUDA_I8_I8;
    const int64_t element = integer ? 1 : product == BK_CUDA_F16_T2 ? 2 : 6;
    Workspace w;
    w.x = 0;
    w.sums = w.x + aligned_up(M * padded_to_64(K) * element);
    w.scale = w.sums + (integer ? aligned_up(M * (plan.grouped ? groups.columns : 1) * 4) : 0);
    w.maxima = w.scale + (integer ? aligned_up(M * 4) : 0);
    w.multipliers = w.maxima + (integer ? aligned_up(kMaxMaxima * 4) : 0);
    w.partial = w.multipliers + (plan.multiplied ? aligned_up(groups.columns * weight_rows(product, N) * 4) : 0);
    const int64_t parts = plan.grouped ? groups.columns : plan.splits;
    w.bytes = w.partial + (plan.splits > 1 ? aligned_up(parts * M * N * 4) : 0);
    return w;
}

// Queues the quantization of x, and the placing of multipliers if there are any; maxima is memory for kMaxMaxima values
// if one scale serves all tokens, else null.
const char *quantize(const void *x, int32_t x_type, int64_t x_stride, int64_t M, int64_t K, uint32_t *maxima,
                     QuantizeParams params, void *stream) {
    params.x = x;
    params.x_stride = x_stride;
    params.x_type = x_type;
    params.x_vector = x_type != BK_CUDA_I8 && is_vector(x, x_type, x_stride);
    params.K = static_cast<int32_t>(K);
    params.maxima = maxima;
    if (maxima) {
        params.maxima_count = static_cast<int32_t>(M < kMaxMaxima ? M : kMaxMaxima);
        const AbsmaxParams absmax = {x, x_stride, x_type, params.x_vector, maxima, M, params.K};
        if (const char *error = run_absmax(absmax, params.maxima_count, stream)) return error;
    }
    params.tokens = M;
    return run_quantize(params, M + (params.place.multiplier ? place_blocks(params.place) : 0), stream);
}

// Where the codes of x and their scales are to stay, or nulls.
struct Kept {
    int8_t *codes;
    float *scale;
};

// How one token runs as one kernel: the warps to a packed row, 0 if it does not fit in shared memory.
int gemv_team(const MatmulParams &matmul, bool grouped, int multiprocessors) {
    const int64_t group = 64 * static_cast<int64_t>(matmul.group_blocks);
    if (grouped ? !is_gemv_group(group) : matmul.K > kGemvMaxK) return 0;
    // As few warps as still give work to every multiprocessor's block, but for groups enough that terms fit.
    const int64_t warps = static_cast<int64_t>(multiprocessors) * kGemvWarps;
    int team = 1;
    while (team < kGemvWarps && matmul.weight_rows * team < warps && matmul.K > 512 * team) team *= 2;
    if (!grouped) return team;
    while (team <= kGemvWarps && gemv_grouped_shared_bytes(matmul.K, matmul.columns, team) > kSharedBytes) team *= 2;
    return team <= kGemvWarps ? team : 0;
}

const char *run_gemv(const void *x, int32_t x_type, const MatmulParams &matmul, const Weights &weights, int team,
                     int multiprocessors, void *stream) {
    const GemvParams p = {matmul,
                          x,
                          x_type,
                          is_vector(x, x_type, 0),
                          team,
                          gemv_terms_stride(team),
                          weights.multiplier,
                          static_cast<int32_t>(weights.scale_columns)};
    const int64_t blocks = ceil_div(matmul.weight_rows, kGemvWarps / team);
    const Grid grid = {blocks < multiprocessors ? blocks : multiprocessors, 1};
    const uint32_t shared =
        weights.grouped() ? gemv_grouped_shared_bytes(matmul.K, matmul.columns, team) : gemv_shared_bytes(matmul.K);
    const auto kernel = weights.grouped()    ? gemv_kernel<GemvGroups::kFloats>
                        : weights.multiplier ? gemv_kernel<GemvGroups::kMultipliers>
                                             : gemv_kernel<GemvGroups::kNone>;
    return launch(kernel, grid, kGemvThreads, shared, stream, p);
}

// How few tokens run as one kernel of clusters, and whether they do: grid.x is 0 if not.
struct FusedPlan {
    int tiles, team;
    int32_t steps;
    Grid grid;
};

FusedPlan plan_fused(const MatmulParams &p, bool multiplied, bool per_tensor, int multiprocessors) {
    FusedPlan plan = {p.M <= 8 ? 1 : 2, 1, 0, {0, 0}};
    const int64_t token_tiles = ceil_div(p.M, 8 * plan.tiles), bytes = p.weight_rows * p.K;
    const int64_t shared = fused_shared_bytes(plan.tiles, multiplied, p.K);
    // Clusters that run at once: with one block on a multiprocessor, beside which the next kernel's can start, or two.
    const int64_t at_once = (token_tiles > 1 ? 2 : 1) * multiprocessors / kClusterBlocks / token_tiles;
    if (shared > kLargeSharedBytes) return plan;
    // More tokens read the weights again, from L2, and one scale for all tokens needs them all in one cluster.
    if (token_tiles > 1 && (per_tensor || at_once < 1 || token_tiles * bytes > kFusedTraffic)) return plan;
    const int64_t row_tiles = ceil_div(p.weight_rows, kFusedRows), blocks = ceil_div(p.blocks, kClusterBlocks);
    int64_t least = 0;
    for (int team = 1; team <= kFusedWarps; team *= 2) {
        const int64_t wanted = ceil_div(row_tiles * team, kFusedWarps), clusters = clamp(at_once, 1, wanted);
        const int64_t steps = ceil_div(wanted, clusters), time = steps * (ceil_div(blocks, team) + kFusedStepBlocks);
        if (least > 0 && time >= least) continue;
        least = time;
        plan.team = team;
        plan.steps = static_cast<int32_t>(steps);
        plan.grid = {clusters * kClusterBlocks, token_tiles};
    }
    return plan;
}

// Codes, exact sums, scales: all linear layers with int8 activations, and the product alone.
int32_t linear_i8(bk_cuda_product product, const Shape &shape, const void *x, int32_t x_type, int64_t x_stride,
                  const Weights &weights, const Output &output, const Kept &kept, bool per_tensor, void *workspace,
                  int multiprocessors, void *stream) {
    BK_CUDA_TRY(check_linear(shape, weights, output, workspace, multiprocessors));
    if (shape.M == 0) return BK_CUDA_OK;
    if (x_type != BK_CUDA_I8) BK_CUDA_TRY(check_tensor(shape, "x", x, x_type));
    MatmulParams p = params_of(product, shape, weights, output);
    if (product == BK_CUDA_I8_T2 && shape.M == 1 && x_type != BK_CUDA_I8 && !kept.codes) {
        if (const int team = gemv_team(p, weights.grouped(), multiprocessors)) {
            return launched(shape, run_gemv(x, x_type, p, weights, team, multiprocessors, stream));
        }
    }
    // All that fused_kernel copies to shared memory goes in 16 bytes, multipliers in four.
    const bool is_half = x_type == BK_CUDA_BF16 || x_type == BK_CUDA_F16;
    if (product == BK_CUDA_I8_T2 && !weights.grouped() && !kept.codes && is_half && is_vector(x, x_type, x_stride) &&
        p.weight_vector && aligned(weights.multiplier, weights.scale_columns, 4) && has_clusters()) {
        const FusedPlan fused = plan_fused(p, weights.multiplier != nullptr, per_tensor, multiprocessors);
        if (fused.grid.x > 0) {
            const FusedParams q = {p,
                                   static_cast<const uint16_t *>(x),
                                   x_stride,
                                   x_type,
                                   per_tensor,
                                   weights.multiplier,
                                   static_cast<int32_t>(weights.scale_columns),
                                   fused.team,
                                   fused.steps};
            return launched(shape, run_fused(q, fused.tiles, fused.grid, stream));
        }
    }
    const Plan plan = plan_matmul(product, shape.M, shape.N, shape.K, weights.groups(), multiprocessors,
                                  p.weight_vector && has_wgmma());
    const Workspace parts = lay_out(product, shape.M, shape.N, shape.K, weights.groups(), plan);
    QuantizeParams q = {};
    // Codes that the caller keeps are in the order of the columns; wgmma_kernel reads a copy in its own.
    int8_t *own = at<int8_t>(workspace, parts.x);
    q.placed = plan.wgmma ? own : nullptr;
    q.codes = kept.codes ? kept.codes : plan.wgmma ? nullptr : own;
    q.code_stride = padded_to_64(shape.K);
    q.code_vector = true;
    q.sums = at<int32_t>(workspace, parts.sums);
    q.scale = kept.scale ? kept.scale : at<float>(workspace, parts.scale);
    q.columns = p.columns;
    if (plan.multiplied) {
        q.place = place_params(shape, weights, at<uint32_t>(workspace, parts.multipliers));
        p.multipliers = q.place.words;
    }
    uint32_t *maxima = per_tensor ? at<uint32_t>(workspace, parts.maxima) : nullptr;
    BK_CUDA_TRY(launched(shape, quantize(x, x_type, x_stride, shape.M, shape.K, maxima, q, stream)));
    p.x = reinterpret_cast<const uint8_t *>(plan.wgmma ? q.placed : q.codes);
    p.x_stride = q.code_stride;
    p.x_sums = q.sums;
    p.x_scale = q.scale;
    p.splits = plan.splits;
    p.partial = at<uint8_t>(workspace, parts.partial);
    return launched(shape, product == BK_CUDA_I8_I8 ? run_int8_int8(plan, p, stream)
                           : plan.multiplied        ? run_multiplied_int8(plan, p, stream)
                                                    : run_ternary_int8(plan, p, stream));
}

}  // namespace

MatmulParams params_of(bk_cuda_product product, const Shape &shape, const Weights &weights, const Output &output) {
    MatmulParams p = {};
    p.weight = static_cast<const uint8_t *>(weights.weight);
    p.weight_rows = weight_rows(product, shape.N);
    p.weight_vector = aligned(weights.weight, shape.K, 16);
    p.weight_scale = weights.scale;
    p.scale_rows = weights.scale_rows == 1 ? 1 : 2;
    p.columns = static_cast<int32_t>(weights.grouped() ? weights.scale_columns : 1);
    p.blocks = static_cast<int32_t>(ceil_div(shape.K, 64));
    p.group_blocks = p.blocks / p.columns;
    p.multiplier_rows = p.weight_rows;
    p.group_shift = weights.multiplier && shape.K / weights.scale_columns == 128 ? 1 : 0;
    p.bias = weights.bias;
    p.bias_type = weights.bias_type;
    p.y = output.y;
    p.y_type = output.y_type;
    p.M = shape.M;
    p.N = shape.N;
    p.K = static_cast<int32_t>(shape.K);
    p.splits = 1;
    return p;
}

PlaceParams place_params(const Shape &shape, const Weights &weights, uint32_t *words) {
    return {weights.multiplier,
            words,
            shape.N,
            ceil_div(shape.N, 4),
            static_cast<int32_t>(weights.scale_columns),
            aligned(weights.multiplier, weights.scale_columns, 4)};
}

int32_t check_linear(const Shape &shape, const Weights &weights, const Output &output, const void *workspace,
                     int32_t multiprocessors) {
    BK_CUDA_TRY(check_shape(shape, weights.scale_rows, weights.scale_columns, 64));
    BK_CUDA_TRY(check_multiplier(shape, weights.multiplier, weights.scale_columns));
    if (shape.M == 0) return BK_CUDA_OK;
    if (output.y_type != BK_CUDA_I32) {
        BK_CUDA_TRY(check_tensor(shape, "y", output.y, output.y_type));
        BK_CUDA_TRY(check_tensor(shape, "weight_scale", weights.scale, BK_CUDA_F32));
    }
    if (weights.bias) BK_CUDA_TRY(check_tensor(shape, "bias", weights.bias, weights.bias_type));
    if (multiprocessors < 1) {
        return fail(BK_CUDA_INVALID_ARGUMENT, "%s: multiprocessors must be at least 1, got %d", shape.op,
                    multiprocessors);
    }
    if (!workspace || !aligned(workspace, 0, kAlignment)) {
        return fail(BK_CUDA_INVALID_ARGUMENT, "%s: workspace must be aligned to 256 bytes, got %p", shape.op,
                    workspace);
    }
    return BK_CUDA_OK;
}

Plan plan_matmul(bk_cuda_product product, int64_t M, int64_t N, int64_t K, Groups groups, int multiprocessors,
                 bool wgmma) {
    Plan plan = {};
    plan.grouped = groups.columns > 0 && !groups.multiplied;
    plan.multiplied = groups.columns > 0 && groups.multiplied;
    plan.few = M <= kFewTokens;
    plan.wgmma = wgmma && product == BK_CUDA_I8_T2 && !plan.grouped && M >= kLeastWgmmaTokens;
    const int64_t rows = weight_rows(product, N), blocks = ceil_div(K, 64);
    int64_t tiles, share;
    if (plan.few) {
        const bool one = M <= 8 && (product == BK_CUDA_I8_T2 || product == BK_CUDA_I8_I8);
        plan.tiles = one ? 1 : 2;
        tiles = ceil_div(rows, 16);
        share = kFewShare;
    } else if (plan.wgmma) {
        tiles = ceil_div(rows, 64) * ceil_div(M, kWgmmaTokens);
        // Two blocks at once on a multiprocessor take twice as long as one of two warpgroups alone.
        const bool pairs = 2 * ceil_div(tiles, 2 * multiprocessors) <= ceil_div(tiles, multiprocessors);
        plan.tiles = pairs ? 1 : 2;
        share = kWgmmaShare;
    } else {
        // Groups keep totals beside their sums, in registers that wider tiles would need.
        plan.tiles = plan.grouped || product == BK_CUDA_F32_T2 ? 2
                     : product == BK_CUDA_F16_T2               ? 4
                     : product == BK_CUDA_I8_T2 && M <= 64     ? 2
                                                               : 8;
        tiles = ceil_div(rows, kManyRows) * ceil_div(M, 16 * plan.tiles);
        share = kManyShare;
    }
    const int64_t wanted = (plan.wgmma ? 1 : 2) * static_cast<int64_t>(multiprocessors) / tiles;
    int64_t most = clamp(blocks / share, 1, kMaxSplits);
    if (plan.grouped) {
        // A group's term is rounded before it is added, so shares write their terms and split_kernel reads them: 8
        // bytes a token, output and group, against K / 4 bytes of weights an output, of which the chip has time for
        // wanted - 1 times as many more.
        const bool pays = plan.few && 32 * M * groups.columns <= K * (wanted - 1);
        most = pays ? clamp(groups.columns / kFewWarps, 1, most) : 1;
    }
    plan.splits = static_cast<int>(clamp(wanted, 1, most));
    plan.grid = {tiles, plan.splits};
    return plan;
}

}  // namespace bitlab

using namespace bitlab;

extern "C" {

int64_t bk_cuda_linear_workspace(int32_t product, int64_t M, int64_t N, int64_t K, int64_t scale_columns,
                                 int32_t multiplied, int32_t multiprocessors) {
    if (M <= 0 || N <= 0 || K <= 0 || multiprocessors < 1) return 0;
    const Groups groups = {scale_columns, multiplied != 0};
    const auto kind = static_cast<bk_cuda_product>(product);
    // Enough with wgmma and without, which depends on the current device and on where the weights lie.
    int64_t most = 0;
    for (int wgmma = 0; wgmma < 2; ++wgmma) {
        const Plan plan = plan_matmul(kind, M, N, K, groups, multiprocessors, wgmma != 0);
        const int64_t bytes = lay_out(kind, M, N, K, groups, plan).bytes;
        most = bytes > most ? bytes : most;
    }
    return most;
}

int32_t bk_cuda_linear_i8_t2(const void *x, int32_t x_type, int64_t x_stride, const uint8_t *qweight,
                             const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                             const uint8_t *multiplier, const void *bias, int32_t bias_type, void *y, int32_t y_type,
                             int64_t M, int64_t N, int64_t K, int32_t per_tensor, void *workspace,
                             int32_t multiprocessors, void *stream) {
    return linear_i8(BK_CUDA_I8_T2, {"bk_cuda_linear_i8_t2", M, N, K}, x, x_type, x_stride,
                     {qweight, weight_scale, scale_rows, scale_columns, multiplier, bias, bias_type}, {y, y_type}, {},
                     per_tensor != 0, workspace, multiprocessors, stream);
}

int32_t bk_cuda_linear_codes_i8_t2(const void *x, int32_t x_type, int64_t x_stride, const uint8_t *qweight,
                                   const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                                   const uint8_t *multiplier, const void *bias, int32_t bias_type, void *y,
                                   int32_t y_type, int8_t *codes, float *x_scale, int64_t M, int64_t N, int64_t K,
                                   int32_t per_tensor, void *workspace, int32_t multiprocessors, void *stream) {
    const Shape shape = {"bk_cuda_linear_codes_i8_t2", M, N, K};
    if (M > 0 && (!codes || !aligned(codes, K, 16) || K % 64 != 0)) {
        return fail(BK_CUDA_INVALID_ARGUMENT,
                    "%s: codes must be aligned to 16 bytes and K a multiple of 64, got %p and K %lld", shape.op,
                    static_cast<void *>(codes), static_cast<long long>(K));
    }
    if (M > 0) BK_CUDA_TRY(check_tensor(shape, "x_scale", x_scale, BK_CUDA_F32));
    return linear_i8(BK_CUDA_I8_T2, shape, x, x_type, x_stride,
                     {qweight, weight_scale, scale_rows, scale_columns, multiplier, bias, bias_type}, {y, y_type},
                     {codes, x_scale}, per_tensor != 0, workspace, multiprocessors, stream);
}

int32_t bk_cuda_linear_i8_i8(const void *x, int32_t x_type, int64_t x_stride, const int8_t *qweight,
                             const float *weight_scale, const void *bias, int32_t bias_type, void *y, int32_t y_type,
                             int64_t M, int64_t N, int64_t K, void *workspace, int32_t multiprocessors, void *stream) {
    return linear_i8(BK_CUDA_I8_I8, {"bk_cuda_linear_i8_i8", M, N, K}, x, x_type, x_stride,
                     {qweight, weight_scale, N, 0, nullptr, bias, bias_type}, {y, y_type}, {}, false, workspace,
                     multiprocessors, stream);
}

int32_t bk_cuda_matmul_i8_t2_i32(const int8_t *codes, const uint8_t *qweight, int32_t *acc, int64_t M, int64_t N,
                                 int64_t K, void *workspace, int32_t multiprocessors, void *stream) {
    return linear_i8(BK_CUDA_I8_T2, {"bk_cuda_matmul_i8_t2_i32", M, N, K}, codes, BK_CUDA_I8, K,
                     {qweight, nullptr, 1, 0, nullptr, nullptr, 0}, {acc, BK_CUDA_I32}, {}, false, workspace,
                     multiprocessors, stream);
}

int32_t bk_cuda_linear_float_t2(const void *x, int32_t x_type, int64_t x_stride, const uint8_t *qweight,
                                const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                                const uint8_t *multiplier, const void *bias, int32_t bias_type, void *y, int32_t y_type,
                                int64_t M, int64_t N, int64_t K, void *workspace, int32_t multiprocessors,
                                void *stream) {
    const Shape shape = {"bk_cuda_linear_float_t2", M, N, K};
    const Weights weights = {qweight, weight_scale, scale_rows, scale_columns, multiplier, bias, bias_type};
    BK_CUDA_TRY(check_linear(shape, weights, {y, y_type}, workspace, multiprocessors));
    if (M == 0) return BK_CUDA_OK;
    BK_CUDA_TRY(check_tensor(shape, "x", x, x_type));
    const bk_cuda_product product = x_type == BK_CUDA_F32 ? BK_CUDA_F32_T2 : BK_CUDA_F16_T2;
    const Plan plan = plan_matmul(product, M, N, K, weights.groups(), multiprocessors, false);
    const Workspace parts = lay_out(product, M, N, K, weights.groups(), plan);
    MatmulParams p = params_of(product, shape, weights, {y, y_type});
    const int64_t padded = padded_to_64(K);
    if (product == BK_CUDA_F16_T2 && K == padded && is_vector(x, x_type, x_stride)) {
        p.x = static_cast<const uint8_t *>(x);
        p.x_stride = x_stride * 2;
    } else {
        const PlanesParams planes = {
            x, x_stride, x_type, is_vector(x, x_type, x_stride), at<uint16_t>(workspace, parts.x), M, p.K};
        BK_CUDA_TRY(launched(shape, run_planes(planes, stream)));
        p.x = at<uint8_t>(workspace, parts.x);
        p.x_stride = padded * 2;
        p.x_plane = M * padded * 2;
    }
    p.splits = plan.splits;
    p.partial = at<uint8_t>(workspace, parts.partial);
    if (plan.multiplied) {
        const PlaceParams place = place_params(shape, weights, at<uint32_t>(workspace, parts.multipliers));
        BK_CUDA_TRY(launched(shape, run_place(place, stream)));
        p.multipliers = place.words;
        return launched(shape, run_multiplied_float(plan, p, x_type, stream));
    }
    return launched(shape, product == BK_CUDA_F32_T2 ? run_ternary_f32(plan, p, stream)
                                                     : run_ternary_16(plan, p, x_type == BK_CUDA_BF16, stream));
}

int32_t bk_cuda_quantize_i8(const void *x, int32_t x_type, int64_t x_stride, int8_t *codes, float *scale, int64_t M,
                            int64_t K, int32_t per_tensor, void *workspace, void *stream) {
    const Shape shape = {"bk_cuda_quantize_i8", M, 1, K};
    BK_CUDA_TRY(check_shape(shape, 1, 0, 64));
    if (M == 0) return BK_CUDA_OK;
    BK_CUDA_TRY(check_tensor(shape, "x", x, x_type));
    QuantizeParams q = {};
    q.codes = codes;
    q.code_stride = K;
    q.code_vector = K % 64 == 0 && aligned(codes, K, 8);
    q.scale = scale;
    q.columns = 1;
    uint32_t *maxima = per_tensor ? static_cast<uint32_t *>(workspace) : nullptr;
    return launched(shape, quantize(x, x_type, x_stride, M, K, maxima, q, stream));
}

}  // extern "C"
