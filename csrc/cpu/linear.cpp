// The functions that multiply: checks, activations, and packed rows shared out among the threads.
#include <math.h>
#include <string.h>

#include "linear.h"

namespace bitlab {

const char *const kWrongTypes = "x_type, y_type and bias_type must be a bk_type";

static const void *token(const QuantizeArgs &args, int64_t m) {
    return static_cast<const char *>(args.x) + m * args.stride * size_of(args.type);
}

float absmax_token(const Kernels &kernels, const QuantizeArgs &args, int64_t m) {
    return kernels.absmax(token(args, m), args.type, args.K);
}

void quantize_token(const Kernels &kernels, const QuantizeArgs &args, float most, int8_t *codes, float *scale,
                    int32_t *sums, int64_t m) {
    if (!isfinite(most)) {
        memset(codes, 0, static_cast<size_t>(args.planes * args.padded_to));
        memset(sums, 0, static_cast<size_t>(args.planes * args.columns) * sizeof(int32_t));
        *scale = NAN;
        return;
    }
    if (args.planes == 1) {
        most = most < 1e-5f ? 1e-5f : most;
        kernels.quantize(token(args, m), args.type, 127.0f / most, args.K, args.padded_to, codes, sums, args.columns);
        *scale = most / 127.0f;
        return;
    }
    int exponent = 0;
    frexp(static_cast<double>(most), &exponent);
    kernels.quantize_planes(token(args, m), args.type, ldexp(1.0, 30 - exponent), args.K, args.padded_to, codes, sums,
                            args.columns);
    *scale = static_cast<float>(exponent - 30);
}

void linear_blocks(const Kernels &kernels, const LinearArgs &args, Scratch *scratch, int64_t first, int64_t last,
                   int64_t thread) {
    const int64_t R = (args.N + 3) / 4;
    const int64_t end = last * kBlock < R ? last * kBlock : R;
    if (first * kBlock < end) kernels.linear(args, first * kBlock, end, scratch ? scratch + thread : nullptr);
}

bool valid_types(const bk_linear_args &call) {
    return valid_type(call.x_type) && valid_type(call.y_type) && (!call.bias || valid_type(call.bias_type));
}

LinearArgs linear_args(const bk_linear_args &call, const Activations &x) {
    return {x,
            static_cast<const uint8_t *>(call.qweight),
            call.weight_scale,
            call.scale_rows,
            call.scale_columns != 0 && !call.multiplier,
            call.multiplier,
            call.K / groups(call.scale_columns),
            call.bias,
            static_cast<int32_t>(call.bias_type),
            call.y,
            static_cast<int32_t>(call.y_type),
            call.M,
            call.N,
            call.K};
}

namespace {

// The parts of the workspace; `panels` and `scratch` are null where few tokens need none.
struct Workspace {
    int8_t *codes;
    int8_t *panels;
    Scratch *scratch;
    float *scale;
    int32_t *sums;

    static int64_t scratch_bytes(int64_t rows, int32_t num_threads) {
        const int64_t threads = num_threads < 1 ? 1 : num_threads;
        return rows < kLeastPanel ? 0 : threads * static_cast<int64_t>(sizeof(Scratch));
    }
    static int64_t panel_bytes(int64_t rows, int64_t K) {
        return rows < kLeastPanel ? 0 : (rows + kMostPanelTokens - 1) * padded(K);
    }
    static int64_t bytes(int64_t M, int64_t K, int64_t columns, int64_t planes, int32_t num_threads) {
        const int64_t rows = M * planes;
        return rows * padded(K) + panel_bytes(rows, K) + scratch_bytes(rows, num_threads) + 4 * M + 4 * rows * columns;
    }
    Workspace(const Kernels &kernels, void *memory, int64_t M, int64_t K, int64_t planes, int32_t num_threads) {
        const int64_t rows = M * planes;
        codes = static_cast<int8_t *>(memory);
        int8_t *next = codes + rows * padded(K);
        panels = rows < kernels.panel_from ? nullptr : next;
        next += panel_bytes(rows, K);
        const int64_t size = scratch_bytes(rows, num_threads);
        scratch = size ? reinterpret_cast<Scratch *>(next) : nullptr;
        scale = reinterpret_cast<float *>(next + size);
        sums = reinterpret_cast<int32_t *>(scale + M);
    }
    // columns: sums of the codes of each token.
    Activations activations(int64_t columns, int64_t planes) const {
        return {codes, panels, scale, sums, columns, planes};
    }
};

// Tokens [first, last). tensor_max is the max|x| of the whole tensor, or null to take each token's.
void quantize_tokens(const Kernels &kernels, const QuantizeArgs &args, const float *tensor_max, int8_t *codes,
                     float *scale, int32_t *sums, int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
        const float most = tensor_max ? *tensor_max : absmax_token(kernels, args, m);
        quantize_token(kernels, args, most, codes + m * args.planes * args.padded_to, scale + m,
                       sums + m * args.planes * args.columns, m);
    }
}

// max|x| over all tokens; scale is [M] of scratch.
float absmax_tensor(const Kernels &kernels, const QuantizeArgs &args, float *scale, int threads) {
    parallel(args.M, threads, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; ++m) scale[m] = absmax_token(kernels, args, m);
    });
    float most = 0.0f;
    for (int64_t m = 0; m < args.M; ++m) {
        most = larger(most, scale[m]);
        if (!isfinite(most)) break;
    }
    return most;
}

// The codes of all tokens, then f(first, last, thread) on shares of the tasks; with one wake-up of the threads.
template <typename F>
void quantize_then(const Kernels &kernels, const QuantizeArgs &x, const Workspace &parts, int64_t tasks, int threads,
                   F &&f) {
    float most = 0.0f;
    const float *tensor_max = nullptr;
    if (x.per_tensor) {
        most = absmax_tensor(kernels, x, parts.scale, threads);
        tensor_max = &most;
    }
    const auto quantize = [&](int64_t first, int64_t last) {
        quantize_tokens(kernels, x, tensor_max, parts.codes, parts.scale, parts.sums, first, last);
        if (parts.panels && first < last) {
            const int64_t row = first * x.planes * x.padded_to;
            kernels.interleave(parts.codes + row, x.padded_to, (last - first) * x.planes, parts.panels + row);
        }
    };
    // One token is quantized once, by the caller: the others would wait for it in any case.
    const bool alone = threads == 1 || x.M == 1;
    if (alone) quantize(0, x.M);
    if (threads == 1) {
        f(int64_t{0}, tasks, int64_t{0});
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads();
        const int64_t me = omp_get_thread_num();
        if (!alone) {
            // Shares of whole panels.
            const int64_t unit = kernels.panel_tokens;
            const int64_t units = (x.M + unit - 1) / unit;
            const int64_t last = units * (me + 1) / count * unit;
            quantize(units * me / count * unit, last < x.M ? last : x.M);
#pragma omp barrier
        }
        f(tasks * me / count, tasks * (me + 1) / count, me);
    }
}

// Many tokens cost arithmetic, not memory: eight of them as much as reading the weights.
int linear_threads(int64_t rows, int64_t packed_bytes, int64_t tasks, int32_t limit) {
    return threads_for(packed_bytes * (1 + rows / 8), kBytesPerThread, tasks, limit);
}

int32_t linear_t2(const bk_linear_args &call, int64_t planes, bool per_tensor) {
    const int64_t M = call.M, N = call.N, K = call.K;
    if (const char *text = check_shape(M, N, K, call.scale_rows, call.scale_columns, kPadK)) {
        return fail(BK_INVALID_ARGUMENT, text);
    }
    if (const char *text = check_multiplier(call.multiplier, N, K, call.scale_rows, call.scale_columns)) {
        return fail(BK_INVALID_ARGUMENT, text);
    }
    if (!valid_types(call)) return fail(BK_INVALID_ARGUMENT, kWrongTypes);
    if (M == 0) return BK_OK;
    const auto limit = static_cast<int32_t>(call.num_threads);
    const Kernels &kernels = selected_kernels();
    const int64_t columns = call.multiplier && !kernels.group_sums ? 1 : groups(call.scale_columns);
    const Workspace parts(kernels, call.workspace, M, K, planes, limit);
    const LinearArgs args = linear_args(call, parts.activations(columns, planes));
    const QuantizeArgs quantize = {
        call.x, static_cast<int32_t>(call.x_type), call.x_stride, M, K, padded(K), columns, planes, per_tensor};
    const int threads = linear_threads(M * planes, (N + 3) / 4 * K, blocks(N), limit);
    quantize_then(kernels, quantize, parts, blocks(N), threads, [&](int64_t first, int64_t last, int64_t thread) {
        linear_blocks(kernels, args, parts.scratch, first, last, thread);
    });
    return BK_OK;
}

}  // namespace
}  // namespace bitlab

using namespace bitlab;

extern "C" {

int64_t bk_cpu_linear_workspace(int64_t M, int64_t K, int64_t scale_columns, int32_t planes, int32_t num_threads) {
    return Workspace::bytes(M, K, groups(scale_columns), planes, num_threads);
}

int32_t bk_cpu_linear_i8_t2(const bk_linear_args *args) { return linear_t2(*args, 1, args->per_tensor != 0); }

int32_t bk_cpu_linear_f32_t2(const bk_linear_args *args) { return linear_t2(*args, BK_FLOAT_PLANES, false); }

int32_t bk_cpu_linear_i8_i8(const bk_linear_args *call) {
    const int64_t M = call->M, N = call->N, K = call->K;
    if (const char *text = check_shape(M, N, K, call->scale_rows, call->scale_columns, 1)) {
        return fail(BK_INVALID_ARGUMENT, text);
    }
    if (call->scale_rows != N || call->scale_columns != 0 || call->multiplier) {
        return fail(BK_INVALID_ARGUMENT, "int8 weights must have a scale a row");
    }
    if (!valid_types(*call)) return fail(BK_INVALID_ARGUMENT, kWrongTypes);
    if (M == 0) return BK_OK;
    const auto limit = static_cast<int32_t>(call->num_threads);
    const Kernels &kernels = selected_kernels();
    Workspace parts(kernels, call->workspace, M, K, 1, limit);
    parts.panels = nullptr;
    const LinearArgs args = linear_args(*call, parts.activations(1, 1));
    const int64_t tasks = (N + kBlock - 1) / kBlock;
    const QuantizeArgs quantize = {call->x, static_cast<int32_t>(call->x_type), call->x_stride, M, K, padded(K), 1, 1,
                                   false};
    quantize_then(kernels, quantize, parts, tasks, linear_threads(M, N * K, tasks, limit),
                  [&](int64_t first, int64_t last, int64_t) {
                      const int64_t end = last * kBlock < N ? last * kBlock : N;
                      kernels.linear_i8(args, first * kBlock, end);
                  });
    return BK_OK;
}

int32_t bk_cpu_quantize_i8(const void *x, int32_t x_type, int64_t x_stride, int8_t *codes, float *scale, int64_t M,
                           int64_t K, int32_t per_tensor, int32_t num_threads) {
    if (const char *text = check_shape(M, 1, K, 1, 0, 1)) return fail(BK_INVALID_ARGUMENT, text);
    if (!valid_type(x_type)) return fail(BK_INVALID_ARGUMENT, "x_type must be a bk_type");
    const Kernels &kernels = selected_kernels();
    const QuantizeArgs args = {x, x_type, x_stride, M, K, K, 1, 1, per_tensor != 0};
    const int threads = threads_for(M * K, kElementsPerThread, M, num_threads);
    const float most = per_tensor ? absmax_tensor(kernels, args, scale, threads) : 0.0f;
    parallel(M, threads, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; ++m) {
            int32_t sum;
            const float own = per_tensor ? most : absmax_token(kernels, args, m);
            quantize_token(kernels, args, own, codes + m * K, scale + m, &sum, m);
        }
    });
    return BK_OK;
}

int32_t bk_cpu_matmul_i8_t2_i32(const int8_t *codes, const uint8_t *qweight, int32_t *acc, int64_t M, int64_t N,
                                int64_t K, void *workspace, int32_t num_threads) {
    if (const char *text = check_shape(M, N, K, 1, 0, 1)) return fail(BK_INVALID_ARGUMENT, text);
    if (M == 0) return BK_OK;
    const Kernels &kernels = selected_kernels();
    const Workspace parts(kernels, workspace, M, K, 1, num_threads);
    for (int64_t m = 0; m < M; ++m) {
        int8_t *row = parts.codes + m * padded(K);
        memset(row, 0, static_cast<size_t>(padded(K)));
        memcpy(row, codes + m * K, static_cast<size_t>(K));
        parts.sums[m] = 0;
        for (int64_t k = 0; k < K; ++k) parts.sums[m] += row[k];
    }
    LinearArgs args = {};
    if (parts.panels) kernels.interleave(parts.codes, padded(K), M, parts.panels);
    args.x = {parts.codes, parts.panels, nullptr, parts.sums, 1, 1};
    args.qweight = qweight;
    args.scale_rows = 1;
    args.y = acc;
    args.y_type = kI32;
    args.M = M;
    args.N = N;
    args.K = K;
    const int threads = linear_threads(M, (N + 3) / 4 * K, blocks(N), num_threads);
    if (threads == 1) {
        linear_blocks(kernels, args, parts.scratch, 0, blocks(N), 0);
        return BK_OK;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads();
        const int64_t me = omp_get_thread_num();
        linear_blocks(kernels, args, parts.scratch, blocks(N) * me / count, blocks(N) * (me + 1) / count, me);
    }
    return BK_OK;
}

}  // extern "C"
