// Errors, the choice of the instruction set, and the functions on weights.
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include <atomic>

#include "common.h"

namespace bitlab {
namespace {

thread_local char last_error[256] = "";

// Best first. A row is an instruction set compiled in; its supported() covers every -m flag of its file.
const Kernels *const kTable[] = {
#if defined(__x86_64__)
    &kKernelsAvx512Vnni, &kKernelsAvxVnni, &kKernelsAvx512Bw, &kKernelsAvx2,
#elif defined(__aarch64__)
    &kKernelsNeonI8mm,
    &kKernelsNeonDotprod,
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

// The sum of the rows' sums, in lanes as bitkernels.h fixes it.
double sum_of_rows(const double *sums, int64_t rows) {
    constexpr int64_t kLanes = 256;
    double lanes[kLanes] = {};
    for (int64_t n = 0; n < rows; ++n) lanes[n % kLanes] += sums[n];
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    return lanes[0];
}

// The absmean scale of `count` elements.
float absmean(double sum, int64_t count) {
    const float mean = static_cast<float>(sum / static_cast<double>(count));
    if (!isfinite(mean)) return static_cast<float>(NAN);
    return mean < 1e-5f ? 1e-5f : mean;
}

}  // namespace

int32_t fail(bk_status status, const char *text) {
    snprintf(last_error, sizeof(last_error), "%s", text);
    return status;
}

const Kernels &selected_kernels() { return *selected.load(std::memory_order_relaxed); }

int threads_for(int64_t work, int64_t per_thread, int64_t tasks, int32_t limit) {
    if (forked_child.load(std::memory_order_relaxed) || limit <= 1) return 1;
    int64_t threads = work / per_thread;
    if (threads > tasks) threads = tasks;
    if (threads > limit) threads = limit;
    return threads < 1 ? 1 : static_cast<int>(threads);
}

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

const char *check_multiplier(const uint8_t *multiplier, int64_t N, int64_t K, int64_t scale_rows,
                             int64_t scale_columns) {
    if (!multiplier) return nullptr;
    if (scale_rows != N) return "scale_rows must be N beside multipliers";
    if (scale_columns < 1 || (K != scale_columns * 64 && K != scale_columns * 128)) {
        return "groups with multipliers must be of 64 or 128 columns";
    }
    return nullptr;
}

}  // namespace bitlab

using namespace bitlab;

extern "C" {

int32_t bk_cpu_abi_version(void) { return BK_ABI_VERSION; }

const char *bk_cpu_last_error(void) { return last_error; }

const char *bk_cpu_supported_isas(void) { return supported_isas; }

const char *bk_cpu_isa(void) { return selected_kernels().name; }

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

int32_t bk_cpu_weight_scale(const void *weight, int32_t weight_type, float *weight_scale, int64_t scale_rows,
                            int64_t scale_columns, double *row_sums, int64_t N, int64_t K, int32_t num_threads) {
    if (const char *text = check_shape(0, N, K, scale_rows, scale_columns, 16)) return fail(BK_INVALID_ARGUMENT, text);
    if (!valid_type(weight_type)) return fail(BK_INVALID_ARGUMENT, "weight_type must be a bk_type");
    if (scale_rows == 1 && scale_columns == 0 && N > 1 && !row_sums) {
        return fail(BK_INVALID_ARGUMENT, "row_sums must be given for a per-tensor scale");
    }
    const Kernels &kernels = selected_kernels();
    const int64_t columns = groups(scale_columns);
    const int64_t width = K / columns;
    const bool per_tensor = scale_rows == 1 && scale_columns == 0 && row_sums;
    parallel(N, threads_for(N * K, kElementsPerThread, N, num_threads), [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) {
            for (int64_t c = 0; c < columns; ++c) {
                const double sum = kernels.abs_sum(weight, weight_type, n * K + c * width, width);
                if (per_tensor) {
                    row_sums[n] = sum;
                } else {
                    weight_scale[n * columns + c] = absmean(sum, width);
                }
            }
        }
    });
    if (per_tensor) weight_scale[0] = absmean(sum_of_rows(row_sums, N), N * K);
    return BK_OK;
}

int32_t bk_cpu_learned_gradients(const void *dw, int32_t dw_type, const void *weight, int32_t weight_type,
                                 const float *step, int64_t scale_rows, int64_t scale_columns, void *gradient,
                                 float *step_gradient, double *row_sums, int64_t N, int64_t K, int32_t num_threads) {
    if (const char *text = check_shape(0, N, K, scale_rows, scale_columns, 1)) return fail(BK_INVALID_ARGUMENT, text);
    if (!valid_type(dw_type)) return fail(BK_INVALID_ARGUMENT, "dw_type must be a bk_type");
    if (!valid_type(weight_type)) return fail(BK_INVALID_ARGUMENT, "weight_type must be a bk_type");
    const bool per_tensor = scale_rows == 1 && scale_columns == 0;
    if (per_tensor && !row_sums) return fail(BK_INVALID_ARGUMENT, "row_sums must be given for a per-tensor step");
    const Kernels &kernels = selected_kernels();
    const LearnedArgs args = {dw, dw_type, weight, weight_type, gradient};
    const int64_t columns = groups(scale_columns);
    const int64_t width = K / columns;
    const auto of_scale = [](double sum, int64_t count) {
        return static_cast<float>(sum / sqrt(static_cast<double>(count)));
    };
    parallel(N, threads_for(N * K, kElementsPerThread, N, num_threads), [&](int64_t first, int64_t last) {
        for (int64_t i = first * columns; i < last * columns; ++i) {
            const double sum = kernels.learned(args, i * width, width, step[per_tensor ? 0 : i]);
            if (per_tensor) {
                row_sums[i] = sum;
            } else {
                step_gradient[i] = of_scale(sum, width);
            }
        }
    });
    if (per_tensor) step_gradient[0] = of_scale(sum_of_rows(row_sums, N), N * K);
    return BK_OK;
}

int32_t bk_cpu_pack_t2(const void *weight, int32_t weight_type, const float *weight_scale, int64_t scale_rows,
                       int64_t scale_columns, uint8_t *qweight, int64_t N, int64_t K, int32_t num_threads) {
    if (const char *text = check_shape(0, N, K, scale_rows, scale_columns, 1)) return fail(BK_INVALID_ARGUMENT, text);
    if (!valid_type(weight_type)) return fail(BK_INVALID_ARGUMENT, "weight_type must be a bk_type");
    const Kernels &kernels = selected_kernels();
    const PackArgs args = {weight, weight_type, weight_scale, scale_rows, groups(scale_columns), qweight,
                           N,      K,           nullptr};
    const int64_t R = (N + 3) / 4;
    parallel(R, threads_for(N * K, kElementsPerThread, R, num_threads),
             [&](int64_t first, int64_t last) { kernels.pack(args, first, last); });
    return BK_OK;
}

int32_t bk_cpu_pack_groups_t2(const void *weight, int32_t weight_type, float *weight_scale, uint8_t *multiplier,
                              uint8_t *qweight, int64_t N, int64_t K, int64_t columns, int32_t num_threads) {
    if (const char *text = check_shape(0, N, K, N, columns, 64)) return fail(BK_INVALID_ARGUMENT, text);
    if (const char *text = check_multiplier(multiplier, N, K, N, columns)) return fail(BK_INVALID_ARGUMENT, text);
    if (!valid_type(weight_type)) return fail(BK_INVALID_ARGUMENT, "weight_type must be a bk_type");
    const Kernels &kernels = selected_kernels();
    const PackArgs args = {weight, weight_type, nullptr, N, columns, qweight, N, K, nullptr};
    const int64_t R = (N + 3) / 4;
    parallel(R, threads_for(N * K, kElementsPerThread, R, num_threads),
             [&](int64_t first, int64_t last) { kernels.pack_groups(args, {weight_scale, multiplier}, first, last); });
    return BK_OK;
}

int32_t bk_cpu_unpack_t2(const uint8_t *qweight, const float *weight_scale, int64_t scale_rows, int64_t scale_columns,
                         const uint8_t *multiplier, void *weight, int32_t weight_type, int64_t N, int64_t K,
                         int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column,
                         int32_t num_threads) {
    if (const char *text = check_shape(0, N, K, scale_rows, scale_columns, 1)) return fail(BK_INVALID_ARGUMENT, text);
    if (const char *text = check_multiplier(multiplier, N, K, scale_rows, scale_columns)) {
        return fail(BK_INVALID_ARGUMENT, text);
    }
    if (!valid_type(weight_type)) return fail(BK_INVALID_ARGUMENT, "weight_type must be a bk_type");
    const int64_t R = (N + 3) / 4;
    if (first_row < 0 || first_row > last_row || last_row > R || first_column < 0 || first_column > last_column ||
        last_column > K) {
        return fail(BK_INVALID_ARGUMENT, "the block must lie within the packed weight");
    }
    const Kernels &kernels = selected_kernels();
    // The kernel only reads qweight; the struct serves packing too.
    const PackArgs args = {
        weight, weight_type, weight_scale, scale_rows, groups(scale_columns), const_cast<uint8_t *>(qweight),
        N,      K,           multiplier};
    const Block block = {first_row, last_row, first_column, last_column};
    const int64_t rows = last_row - first_row;
    const int64_t work = 4 * rows * (last_column - first_column);
    parallel(rows, threads_for(work, kElementsPerThread, rows, num_threads),
             [&](int64_t first, int64_t last) { kernels.unpack(args, block, first_row + first, first_row + last); });
    return BK_OK;
}

int32_t bk_cpu_find_invalid_t2(const uint8_t *const *qweights, const int64_t *counts, int64_t matrices, int64_t *found,
                               int32_t num_threads) {
    if (matrices < 0) return fail(BK_INVALID_ARGUMENT, "matrices must be at least 0");
    int64_t total = 0;
    for (int64_t m = 0; m < matrices; ++m) {
        if (counts[m] < 0) return fail(BK_INVALID_ARGUMENT, "counts must be at least 0");
        total += counts[m];
    }
    const Kernels &kernels = selected_kernels();
    // Threads take the next part when they are done with one, not a share each: where other processes hold a core, the
    // rest is done by then. All count the parts of all matrices alike.
    const int64_t parts = total / kScanPart + matrices;
    std::atomic<int64_t> next{0}, first_found{matrices};
    parallel(parts, threads_for(total, kBytesPerThread, parts, num_threads), [&](int64_t, int64_t) {
        int64_t m = 0, before = 0;
        for (int64_t part = next.fetch_add(1); m < matrices; part = next.fetch_add(1)) {
            while (m < matrices && part - before >= scan_parts(counts[m])) before += scan_parts(counts[m++]);
            if (m >= first_found.load(std::memory_order_relaxed)) return;
            const int64_t begin = (part - before) * kScanPart;
            const int64_t size = counts[m] - begin < kScanPart ? counts[m] - begin : kScanPart;
            if (!kernels.has_invalid(qweights[m] + begin, size)) continue;
            int64_t known = first_found.load();
            while (m < known && !first_found.compare_exchange_weak(known, m)) {
            }
        }
    });
    *found = first_found.load() < matrices ? first_found.load() : -1;
    return BK_OK;
}

}  // extern "C"
