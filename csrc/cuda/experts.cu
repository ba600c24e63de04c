// All experts of a layer in one call: sort and quantize in one launch, multiply in one or two.
#include "experts.cuh"

#include "route.cuh"

namespace bitlab {
namespace {

// The counts of one warp fit in shared memory.
constexpr int64_t kMostExperts = 8192;
constexpr int64_t kMostRows = 0x7FFFFFFF;
// Blocks of packed rows are counted by a grid's y.
constexpr int64_t kMostOutputs = 4 * static_cast<int64_t>(kFewRows) * 0xFFFF;

struct Call {
    const char *op;
    int64_t M, N, K, choices, experts;
    bool per_tensor;

    Shape shape() const { return {op, M, N, K}; }
    int64_t rows() const { return M * choices; }
    // With one scale for all tokens of an expert, a token's codes differ from expert to expert.
    int64_t sharing() const { return per_tensor ? 1 : choices; }
    int64_t code_rows() const { return rows() / sharing(); }
    // Whether 32 bits tell where a token's codes are from the first one's on.
    bool is_near() const { return code_rows() * padded_to_64(K) <= 0xFFFFFFFF; }
};

// The parts of a workspace, in bytes from its beginning.
struct Workspace {
    int64_t x, placed, sums, scale, maxima, multipliers, sorted, codes, few, many, bytes;
};

Workspace lay_out(const Call &call, Groups groups, const ExpertsPlan &plan) {
    const int64_t codes = call.code_rows();
    Workspace w;
    w.x = 0;
    w.placed = w.x + aligned_up(codes * padded_to_64(call.K));
    w.sums = w.placed + (plan.wgmma ? aligned_up(codes * padded_to_64(call.K)) : 0);
    w.scale = w.sums + aligned_up(codes * (plan.grouped ? groups.columns : 1) * 4);
    w.maxima = w.scale + aligned_up(codes * 4);
    w.multipliers = w.maxima + (call.per_tensor ? aligned_up(call.M * 4) : 0);
    const int64_t words = call.experts * groups.columns * ceil_div(call.N, 4);
    w.sorted = w.multipliers + (plan.multiplied ? aligned_up(words * 4) : 0);
    w.codes = w.sorted + aligned_up(call.rows() * 4);
    w.few = w.codes + aligned_up(call.rows() * 4);
    w.many = w.few + aligned_up(plan.most_few * 16);
    w.bytes = w.many + aligned_up(plan.most_many * 16);
    return w;
}

int32_t check_experts(const Call &call, const int64_t *index) {
    const char *text = nullptr;
    if (call.experts < 1 || call.experts > kMostExperts) text = "experts must be from 1 to 8192";
    if (call.choices < 1 || call.rows() > kMostRows) text = "choices must be at least 1, and their rows below 2^31";
    if (call.N > kMostOutputs) text = "N must be at most 4194240";
    if (text) {
        return fail(BK_CUDA_INVALID_ARGUMENT, "%s: %s, got experts %lld, choices %lld, M %lld, N %lld", call.op, text,
                    static_cast<long long>(call.experts), static_cast<long long>(call.choices),
                    static_cast<long long>(call.M), static_cast<long long>(call.N));
    }
    if (call.M > 0 && (!index || !aligned(index, 0, 8))) {
        return fail(BK_CUDA_INVALID_ARGUMENT, "%s: index must be aligned to its elements, got %p", call.op,
                    static_cast<const void *>(index));
    }
    return BK_CUDA_OK;
}

RouteParams route_params(const Call &call, const int64_t *index, const ExpertsPlan &plan, const Workspace &parts,
                         void *workspace) {
    return {index,
            static_cast<int32_t>(call.rows()),
            static_cast<int32_t>(call.experts),
            static_cast<int32_t>(call.choices),
            static_cast<int32_t>(call.sharing()),
            at<int32_t>(workspace, parts.sorted),
            at<int32_t>(workspace, parts.codes),
            {at<Bytes16>(workspace, parts.few), static_cast<int32_t>(plan.most_few), 8 * plan.few},
            {at<Bytes16>(workspace, parts.many), static_cast<int32_t>(plan.most_many), 16 * plan.many},
            route_warps(call.experts)};
}

// Queues the largest of each token, if scales need them, and what else comes before the products.
const char *prepare(const Call &call, ExpertsQuantizeParams params, uint32_t *maxima, void *stream) {
    QuantizeParams &quantize = params.quantize;
    if (call.per_tensor) {
        quantize.maxima = maxima;
        const AbsmaxParams absmax = {quantize.x, quantize.x_stride, quantize.x_type, quantize.x_vector, maxima,
                                     call.M,     quantize.K};
        if (const char *error = run_absmax(absmax, call.M, stream)) return error;
    }
    params.place_blocks = quantize.place.multiplier ? static_cast<int32_t>(place_blocks(quantize.place)) : 0;
    const int64_t blocks = 1 + quantize.tokens + call.experts * params.place_blocks;
    const uint32_t codes = quantize_shared_bytes(call.K), route = route_shared_bytes(call.experts);
    return launch(experts_quantize_kernel, Grid{blocks, 1}, kQuantizeThreads, codes > route ? codes : route, stream,
                  params);
}

int32_t experts_i8(const Call &call, const void *x, int32_t x_type, int64_t x_stride, const int64_t *index,
                   const Weights &weights, const Output &output, void *workspace, void *stream) {
    const Shape shape = call.shape();
    BK_CUDA_TRY(check_experts(call, index));
    BK_CUDA_TRY(check_linear(shape, weights, output, workspace, 1));
    if (call.M == 0) return BK_CUDA_OK;
    BK_CUDA_TRY(check_tensor(shape, "x", x, x_type));
    ExpertsParams p = {};
    static_cast<MatmulParams &>(p) = params_of(BK_CUDA_I8_T2, shape, weights, output);
    const bool wgmma = p.weight_vector && call.is_near() && has_wgmma();
    const ExpertsPlan plan = plan_experts(call.rows(), call.experts, weights.groups(), wgmma);
    const Workspace parts = lay_out(call, weights.groups(), plan);
    ExpertsQuantizeParams q = {};
    q.route = route_params(call, index, plan, parts, workspace);
    q.y = output.y;
    q.y_type = output.y_type;
    q.N = call.N;
    q.quantize.x = x;
    q.quantize.x_stride = x_stride;
    q.quantize.x_type = x_type;
    q.quantize.x_vector = is_vector(x, x_type, x_stride);
    q.quantize.codes = at<int8_t>(workspace, parts.x);
    q.quantize.placed = plan.wgmma ? at<int8_t>(workspace, parts.placed) : nullptr;
    q.quantize.code_stride = padded_to_64(call.K);
    q.quantize.code_vector = true;
    q.quantize.sums = at<int32_t>(workspace, parts.sums);
    q.quantize.scale = at<float>(workspace, parts.scale);
    q.quantize.K = p.K;
    q.quantize.columns = p.columns;
    q.quantize.tokens = call.code_rows();
    if (plan.multiplied) q.quantize.place = place_params(shape, weights, at<uint32_t>(workspace, parts.multipliers));
    BK_CUDA_TRY(launched(shape, prepare(call, q, at<uint32_t>(workspace, parts.maxima), stream)));
    p.x = reinterpret_cast<const uint8_t *>(q.quantize.codes);
    p.x_stride = q.quantize.code_stride;
    p.x_sums = q.quantize.sums;
    p.x_scale = q.quantize.scale;
    p.multipliers = q.quantize.place.words;
    p.sorted = q.route.sorted;
    p.codes = q.route.codes;
    const ExpertsTiles tiles = {q.route.few.tiles, q.route.many.tiles};
    BK_CUDA_TRY(launched(shape, plan.multiplied ? run_experts_multiplied(plan, p, tiles, stream)
                                                : run_experts_int8(plan, p, tiles, stream)));
    if (!plan.wgmma) return BK_CUDA_OK;
    p.x = reinterpret_cast<const uint8_t *>(q.quantize.placed);
    return launched(shape, run_experts_wgmma(plan, p, tiles, stream));
}

}  // namespace

ExpertsPlan plan_experts(int64_t rows, int64_t experts, Groups groups, bool wgmma) {
    ExpertsPlan plan = {};
    plan.grouped = groups.columns > 0 && !groups.multiplied;
    plan.multiplied = groups.columns > 0 && groups.multiplied;
    // As many experts as may get rows, and how many rows these get on average.
    const int64_t visited = rows < experts ? rows : experts, each = rows / visited;
    plan.few = each <= 4 ? 1 : 2;
    // Where few experts have more, theirs are several tiles of few: one launch less.
    plan.many = rows <= kFewTokens || each < 8 ? 0 : plan.grouped || (!wgmma && each <= 48) ? 2 : 4;
    plan.wgmma = wgmma && plan.many == 4;
    const auto most = [](int64_t rows, int64_t experts, int64_t tokens) { return experts + (rows - experts) / tokens; };
    // With tiles of many, an expert has one tile of few at most.
    plan.most_few = plan.many ? visited : most(rows, visited, 8 * plan.few);
    const int64_t full = rows / (kFewTokens + 1);
    plan.most_many = plan.many ? most(rows, full < visited ? full : visited, 16 * plan.many) : 0;
    return plan;
}

}  // namespace bitlab

using namespace bitlab;

extern "C" {

int64_t bk_cuda_experts_workspace(int64_t M, int64_t choices, int64_t experts, int64_t N, int64_t K,
                                  int64_t scale_columns, int32_t multiplied, int32_t per_tensor) {
    const Call call = {"bk_cuda_experts_workspace", M, N, K, choices, experts, per_tensor != 0};
    if (M <= 0 || N <= 0 || K <= 0 || choices <= 0 || experts <= 0) return 0;
    const Groups groups = {scale_columns, multiplied != 0};
    // Enough with wgmma and without, which depends on the current device and on where the weights lie.
    int64_t most = 0;
    for (int wgmma = 0; wgmma < 2; ++wgmma) {
        const int64_t bytes = lay_out(call, groups, plan_experts(call.rows(), experts, groups, wgmma != 0)).bytes;
        most = bytes > most ? bytes : most;
    }
    return most;
}

int32_t bk_cuda_experts_i8_t2(const void *x, int32_t x_type, int64_t x_stride, const int64_t *index, int64_t choices,
                              int64_t experts, const uint8_t *qweight, const float *weight_scale, int64_t scale_rows,
                              int64_t scale_columns, const uint8_t *multiplier, const void *bias, int32_t bias_type,
                              void *y, int32_t y_type, int64_t M, int64_t N, int64_t K, int32_t per_tensor,
                              void *workspace, void *stream) {
    return experts_i8({"bk_cuda_experts_i8_t2", M, N, K, choices, experts, per_tensor != 0}, x, x_type, x_stride, index,
                      {qweight, weight_scale, scale_rows, scale_columns, multiplier, bias, bias_type}, {y, y_type},
                      workspace, stream);
}

}  // extern "C"
