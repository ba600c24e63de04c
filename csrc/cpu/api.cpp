// The C functions of bitkernels.h: argument checks, choice of the instruction set, division of work among threads.
#include "bitkernels.h"

#include <math.h>
#include <omp.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include <atomic>

#include "isa.h"

namespace bitlab {
namespace {

thread_local char last_error[256] = "";

int32_t fail(bk_status status, const char *text) {
    snprintf(last_error, sizeof(last_error), "%s", text);
    return status;
}

// Best first. A row is an instruction set compiled in; its supported() covers every -m flag of its file.
const Kernels *const kTable[] = {
#if defined(__x86_64__)
    &kKernelsAvx512Vnni,
    &kKernelsAvx2,
#endif
    &kKernelsPortable,
};

char supported_isas[128] = "";
std::atomic<const Kernels *> selected{nullptr};

// The OpenMP pool does not survive fork(): a parallel region in the child would wait for threads that are gone.
std::atomic<bool> forked_child{false};

// Runs when the library is loaded, before any call.
struct Startup {
    Startup() {
        size_t used = 0;
        for (const Kernels *kernels : kTable) {
            if (!kernels->supported()) continue;
            if (!selected.load()) selected.store(kernels);
            const int written =
                snprintf(supported_isas + used, sizeof(supported_isas) - used, "%s%s", used ? "," : "", kernels->name);
            used += static_cast<size_t>(written);
        }
        pthread_atfork(nullptr, nullptr, [] { forked_child.store(true); });
    }
} startup;

// A thread is worth its wake-up only for this many multiply-adds or elements.
constexpr int64_t kWorkPerThread = 1 << 16;

int threads_for(int64_t work, int64_t tasks, int32_t limit) {
    if (forked_child.load(std::memory_order_relaxed) || limit <= 1) return 1;
    int64_t threads = work / kWorkPerThread;
    if (threads > tasks) threads = tasks;
    if (threads > limit) threads = limit;
    return threads < 1 ? 1 : static_cast<int>(threads);
}

// Calls f(first, last) on each thread's contiguous share of [0, tasks).
template <typename F>
void parallel(int64_t tasks, int threads, F &&f) {
    if (threads == 1) {
        f(int64_t{0}, tasks);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads();
        const int64_t me = omp_get_thread_num();
        f(tasks * me / count, tasks * (me + 1) / count);
    }
}

bool valid_type(int32_t type) { return type == BK_F32 || type == BK_BF16 || type == BK_F16; }
int64_t groups(int64_t scale_columns) { return scale_columns ? scale_columns : 1; }
int64_t size_of(int32_t type) { return type == BK_F32 ? 4 : 2; }

const char *check_shape(int64_t M, int64_t N, int64_t K, int64_t scale_rows, int64_t scale_columns, int64_t multiple) {
    if (M < 0 || N <= 0 || K <= 0) return "M must be at least 0, N and K at least 1";
    if (K > BK_MAX_IN_FEATURES) return "K must be at most 131071";
    if (scale_rows != 1 && scale_rows != N) return "scale_rows must be 1 or N";
    if (scale_columns == 0) return nullptr;
    if (scale_columns < 0 || K % scale_columns != 0) return "scale_columns must be 0 or divide K";
    if (K / scale_columns % multiple != 0) return "the group size is not a multiple of the vector width";
    if (scale_rows != N) return "scale_rows must be N for per-group scales";
    return nullptr;
}

// The parts of the workspace of a linear call.
struct Workspace {
    int8_t *codes;
    float *scale;
    int32_t *sums;
    Workspace(void *memory, int64_t M, int64_t K)
        : codes(static_cast<int8_t *>(memory)),
          scale(reinterpret_cast<float *>(codes + M * padded(K))),
          sums(reinterpret_cast<int32_t *>(scale + M)) {}
};

struct QuantizeArgs {
    const void *x;
    int32_t type;
    int64_t stride, M, K, padded_to, columns;
    bool per_tensor;
};

// codes[m], scale[m] and sums[m] of every token; sums may be null.
void quantize_tokens(const Kernels &kernels, const QuantizeArgs &args, int8_t *codes, float *scale, int32_t *sums,
                     int threads) {
    const auto token = [&](int64_t m) {
        return static_cast<const char *>(args.x) + m * args.stride * size_of(args.type);
    };
    float tensor_max = 0.0f;
    if (args.per_tensor) {
        parallel(args.M, threads, [&](int64_t first, int64_t last) {
            for (int64_t m = first; m < last; ++m) scale[m] = kernels.absmax(token(m), args.type, args.K);
        });
        for (int64_t m = 0; m < args.M; ++m) {
            if (!(scale[m] <= tensor_max)) tensor_max = scale[m];
            if (!isfinite(tensor_max)) break;
        }
    }
    parallel(args.M, threads, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; ++m) {
            int32_t own_sum;
            int32_t *sum = sums ? sums + m * args.columns : &own_sum;
            int8_t *row = codes + m * args.padded_to;
            float most = args.per_tensor ? tensor_max : kernels.absmax(token(m), args.type, args.K);
            if (!isfinite(most)) {
                memset(row, 0, static_cast<size_t>(args.padded_to));
                for (int64_t c = 0; c < args.columns; ++c) sum[c] = 0;
                scale[m] = NAN;
                continue;
            }
            most = most < 1e-5f ? 1e-5f : most;
            kernels.quantize(token(m), args.type, 127.0f / most, args.K, args.padded_to, row, sum, args.columns);
            scale[m] = most / 127.0f;
        }
    });
}

// Row blocks, not rows, are shared out, so that every thread writes whole runs of outputs.
template <typename F>
void parallel_rows(int64_t N, int threads, F &&f) {
    const int64_t R = (N + 3) / 4;
    parallel((R + kRowBlock - 1) / kRowBlock, threads, [&](int64_t first, int64_t last) {
        const int64_t end = last * kRowBlock < R ? last * kRowBlock : R;
        if (first * kRowBlock < end) f(first * kRowBlock, end);
    });
}

}  // namespace
}  // namespace bitlab

using namespace bitlab;

extern "C" {

int32_t bk_cpu_abi_version(void) { return BK_ABI_VERSION; }

const char *bk_cpu_last_error(void) { return last_error; }

const char *bk_cpu_supported_isas(void) { return supported_isas; }

const char *bk_cpu_isa(void) { return selected.load()->name; }

int32_t bk_cpu_select_isa(const char *name) {
    for (const Kernels *kernels : kTable) {
        if (!kernels->supported()) continue;
        if (strcmp(name, "auto") == 0 || strcmp(name, kernels->name) == 0) {
            selected.store(kernels);
            return BK_OK;
        }
    }
    return fail(BK_UNAVAILABLE, "this CPU or this build lacks the instruction set");
}

int64_t bk_cpu_linear_workspace(int64_t M, int64_t K, int64_t scale_columns) {
    return M * (padded(K) + 4 + 4 * groups(scale_columns));
}

int32_t bk_cpu_linear_i8_t2(const void *x, int32_t x_type, int64_t x_stride, const uint8_t *qweight,
                            const float *weight_scale, int64_t scale_rows, int64_t scale_columns, const void *bias,
                            int32_t bias_type, void *y, int32_t y_type, int64_t M, int64_t N, int64_t K,
                            int32_t per_tensor, void *workspace, int32_t num_threads) {
    if (const char *text = check_shape(M, N, K, scale_rows, scale_columns, kPadK))
        return fail(BK_INVALID_ARGUMENT, text);
    if (!valid_type(x_type) || !valid_type(y_type) || (bias && !valid_type(bias_type))) {
        return fail(BK_INVALID_ARGUMENT, "x_type, y_type and bias_type must be a bk_type");
    }
    if (M == 0) return BK_OK;
    const Kernels &kernels = *selected.load(std::memory_order_relaxed);
    const Workspace parts(workspace, M, K);
    quantize_tokens(kernels, {x, x_type, x_stride, M, K, padded(K), groups(scale_columns), per_tensor != 0},
                    parts.codes, parts.scale, parts.sums, threads_for(M * K, M, num_threads));
    const LinearArgs args = {{parts.codes, parts.scale, parts.sums, groups(scale_columns)},
                             qweight,
                             weight_scale,
                             scale_rows,
                             scale_columns != 0,
                             bias,
                             bias_type,
                             y,
                             y_type,
                             M,
                             N,
                             K};
    const int threads = threads_for(M * N * K / 8, (N + 63) / 64, num_threads);
    parallel_rows(N, threads, [&](int64_t first, int64_t last) { kernels.linear(args, first, last); });
    return BK_OK;
}

int32_t bk_cpu_quantize_i8(const void *x, int32_t x_type, int64_t x_stride, int8_t *codes, float *scale, int64_t M,
                           int64_t K, int32_t per_tensor, int32_t num_threads) {
    if (const char *text = check_shape(M, 1, K, 1, 0, 1)) return fail(BK_INVALID_ARGUMENT, text);
    if (!valid_type(x_type)) return fail(BK_INVALID_ARGUMENT, "x_type must be a bk_type");
    quantize_tokens(*selected.load(std::memory_order_relaxed), {x, x_type, x_stride, M, K, K, 1, per_tensor != 0},
                    codes, scale, nullptr, threads_for(M * K, M, num_threads));
    return BK_OK;
}

int32_t bk_cpu_matmul_i8_t2_i32(const int8_t *codes, const uint8_t *qweight, int32_t *acc, int64_t M, int64_t N,
                                int64_t K, void *workspace, int32_t num_threads) {
    if (const char *text = check_shape(M, N, K, 1, 0, 1)) return fail(BK_INVALID_ARGUMENT, text);
    if (M == 0) return BK_OK;
    const Workspace parts(workspace, M, K);
    for (int64_t m = 0; m < M; ++m) {
        int8_t *row = parts.codes + m * padded(K);
        memset(row, 0, static_cast<size_t>(padded(K)));
        memcpy(row, codes + m * K, static_cast<size_t>(K));
        parts.sums[m] = 0;
        for (int64_t k = 0; k < K; ++k) parts.sums[m] += row[k];
    }
    LinearArgs args = {};
    args.x = {parts.codes, nullptr, parts.sums, 1};
    args.qweight = qweight;
    args.M = M;
    args.N = N;
    args.K = K;
    const Kernels &kernels = *selected.load(std::memory_order_relaxed);
    const int threads = threads_for(M * N * K / 8, (N + 63) / 64, num_threads);
    parallel_rows(N, threads, [&](int64_t first, int64_t last) { kernels.matmul(args, acc, first, last); });
    return BK_OK;
}

int32_t bk_cpu_weight_scale(const void *weight, int32_t weight_type, float *weight_scale, int64_t scale_rows,
                            int64_t scale_columns, double *row_sums, int64_t N, int64_t K, int32_t num_threads) {
    if (const char *text = check_shape(0, N, K, scale_rows, scale_columns, 16)) return fail(BK_INVALID_ARGUMENT, text);
    if (!valid_type(weight_type)) return fail(BK_INVALID_ARGUMENT, "weight_type must be a bk_type");
    if (scale_rows == 1 && scale_columns == 0 && N > 1 && !row_sums) {
        return fail(BK_INVALID_ARGUMENT, "row_sums must be given for a per-tensor scale");
    }
    const Kernels &kernels = *selected.load(std::memory_order_relaxed);
    const auto finish = [](double sum, int64_t count) {
        const float mean = static_cast<float>(sum / static_cast<double>(count));
        if (!isfinite(mean)) return static_cast<float>(NAN);
        return mean < 1e-5f ? 1e-5f : mean;
    };
    const int64_t columns = groups(scale_columns);
    const int64_t width = K / columns;
    const bool per_tensor = scale_rows == 1 && scale_columns == 0 && row_sums;
    parallel(N, threads_for(N * K, N, num_threads), [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) {
            for (int64_t c = 0; c < columns; ++c) {
                const double sum = kernels.abs_sum(weight, weight_type, n * K + c * width, width);
                if (per_tensor) {
                    row_sums[n] = sum;
                } else {
                    weight_scale[n * columns + c] = finish(sum, width);
                }
            }
        }
    });
    if (per_tensor) {
        double sum = 0.0;
        for (int64_t n = 0; n < N; ++n) sum += row_sums[n];
        weight_scale[0] = finish(sum, N * K);
    }
    return BK_OK;
}

int32_t bk_cpu_pack_t2(const void *weight, int32_t weight_type, const float *weight_scale, int64_t scale_rows,
                       int64_t scale_columns, uint8_t *qweight, int64_t N, int64_t K, int32_t num_threads) {
    if (const char *text = check_shape(0, N, K, scale_rows, scale_columns, 1)) return fail(BK_INVALID_ARGUMENT, text);
    if (!valid_type(weight_type)) return fail(BK_INVALID_ARGUMENT, "weight_type must be a bk_type");
    const Kernels &kernels = *selected.load(std::memory_order_relaxed);
    const int64_t R = (N + 3) / 4;
    parallel(R, threads_for(N * K, R, num_threads), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            kernels.pack_row(weight, weight_type, weight_scale, scale_rows, groups(scale_columns), qweight, N, K, r);
        }
    });
    return BK_OK;
}

}  // extern "C"
