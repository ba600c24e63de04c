// What the C functions share: errors, the instruction set in use, division of work among threads.
#ifndef BITLAB_CPU_COMMON_H
#define BITLAB_CPU_COMMON_H

#include <omp.h>
#include <stddef.h>

#include "bitkernels.h"
#include "isa.h"

namespace bitlab {

// Keeps a text for bk_cpu_last_error() and returns the status.
int32_t fail(bk_status status, const char *text);

const Kernels &selected_kernels();

// Returns how many threads a call may use: one in a forked child, and none that has less than `per_thread` to do.
int threads_for(int64_t work, int64_t per_thread, int64_t tasks, int32_t limit);

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

// Elements that are worth a thread's wake-up: to read and convert; packed bytes to multiply with one token.
constexpr int64_t kElementsPerThread = 1 << 15;
constexpr int64_t kBytesPerThread = 1 << 15;
// Packed bytes that are scanned for damage between two looks at what other threads have found.
constexpr int64_t kScanPart = 1 << 16;
inline int64_t scan_parts(int64_t bytes) { return (bytes + kScanPart - 1) / kScanPart; }

inline bool valid_type(int64_t type) { return type == BK_F32 || type == BK_BF16 || type == BK_F16; }
inline int64_t groups(int64_t scale_columns) { return scale_columns ? scale_columns : 1; }
inline int64_t size_of(int32_t type) { return type == BK_F32 ? 4 : 2; }

// Returns what is wrong with the sizes, or null.
const char *check_shape(int64_t M, int64_t N, int64_t K, int64_t scale_rows, int64_t scale_columns, int64_t multiple);

// The same for scales of groups in two levels; null without multipliers.
const char *check_multiplier(const uint8_t *multiplier, int64_t N, int64_t K, int64_t scale_rows,
                             int64_t scale_columns);

}  // namespace bitlab

#endif
