// Host code that the C functions share: errors, checks of sizes, launches.
#ifndef BITLAB_CUDA_COMMON_H
#define BITLAB_CUDA_COMMON_H

#include "bitkernels_cuda.h"
#include "device.h"

namespace bitlab {

// Keeps a text for bk_cuda_last_error() and returns the status.
int32_t fail(bk_cuda_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

struct Shape {
    const char *op;
    int64_t M, N, K;
};

// Turns the result of launch() into a status; the text names the operation and its shape.
int32_t launched(const Shape &shape, const char *error);

// BK_CUDA_OK, or a failure that says what is wrong with the sizes; groups must be a multiple of `multiple`.
int32_t check_shape(const Shape &shape, int64_t scale_rows, int64_t scale_columns, int64_t multiple);

// BK_CUDA_OK, or a failure if there is a multiplier for each group and the groups are not of 64 or 128 columns.
int32_t check_multiplier(const Shape &shape, const void *multiplier, int64_t scale_columns);

// BK_CUDA_OK, or a failure if `type` is no float type or `pointer` is null or not aligned to its elements.
int32_t check_tensor(const Shape &shape, const char *name, const void *pointer, int32_t type);

inline bool is_float(int32_t type) { return type == BK_CUDA_F32 || type == BK_CUDA_BF16 || type == BK_CUDA_F16; }
inline int64_t size_of(int32_t type) {
    return type == BK_CUDA_F32 || type == BK_CUDA_I32 ? 4 : type == BK_CUDA_I8 ? 1 : 2;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded_to_64(int64_t K) { return ceil_div(K, 64) * 64; }

inline bool aligned(const void *pointer, int64_t stride_bytes, int64_t to) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(to) == 0 && stride_bytes % to == 0;
}

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

// Workspaces and their parts.
constexpr int64_t kAlignment = 256;

inline int64_t aligned_up(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

template <typename T>
T *at(void *workspace, int64_t offset) {
    return reinterpret_cast<T *>(static_cast<uint8_t *>(workspace) + offset);
}

// Returns the first failure of statuses that are computed in order.
#define BK_CUDA_TRY(expression)                                 \
    do {                                                        \
        if (const int32_t status = (expression)) return status; \
    } while (0)

}  // namespace bitlab

#endif
