#include "common.h"

#include <stdarg.h>
#include <stdio.h>

#ifndef BK_CUDA_ARCHITECTURES
#define BK_CUDA_ARCHITECTURES "none"
#endif

namespace bitlab {
namespace {

thread_local char last_error[512] = "";
constexpr int64_t kMaxSize = 0x7FFFFFFF;

}  // namespace

int32_t fail(bk_cuda_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

int32_t launched(const Shape &shape, const char *error) {
    if (!error) return BK_CUDA_OK;
    return fail(BK_CUDA_LAUNCH_FAILED, "%s [M %lld, N %lld, K %lld]: %s", shape.op, static_cast<long long>(shape.M),
                static_cast<long long>(shape.N), static_cast<long long>(shape.K), error);
}

int32_t check_shape(const Shape &shape, int64_t scale_rows, int64_t scale_columns, int64_t multiple) {
    const char *text = nullptr;
    if (shape.M < 0 || shape.M > kMaxSize) text = "M must be from 0 to 2^31 - 1";
    if (shape.N <= 0 || shape.N > kMaxSize) text = "N must be from 1 to 2^31 - 1";
    if (shape.K <= 0 || shape.K > BK_CUDA_MAX_IN_FEATURES) text = "K must be from 1 to 131071";
    if (scale_rows != 1 && scale_rows != shape.N) text = "scale_rows must be 1 or N";
    if (scale_columns < 0) text = "scale_columns must be at least 0";
    if (!text && scale_columns > 0) {
        if (scale_rows != shape.N) text = "scale_rows must be N for per-group scales";
        if (shape.K % scale_columns != 0) text = "scale_columns must divide K";
        if (!text && shape.K / scale_columns % multiple != 0) text = "groups must be a multiple of 64 (scales: of 16)";
    }
    if (!text) return BK_CUDA_OK;
    return fail(BK_CUDA_INVALID_ARGUMENT, "%s: %s, got M %lld, N %lld, K %lld, scales [%lld, %lld]", shape.op, text,
                static_cast<long long>(shape.M), static_cast<long long>(shape.N), static_cast<long long>(shape.K),
                static_cast<long long>(scale_rows), static_cast<long long>(scale_columns));
}

int32_t check_multiplier(const Shape &shape, const void *multiplier, int64_t scale_columns) {
    if (!multiplier) return BK_CUDA_OK;
    const int64_t group = scale_columns > 0 ? shape.K / scale_columns : 0;
    if (group == 64 || group == 128) return BK_CUDA_OK;
    return fail(BK_CUDA_INVALID_ARGUMENT,
                "%s: multiplier must be given for groups of 64 or 128 only, got K %lld in %lld", shape.op,
                static_cast<long long>(shape.K), static_cast<long long>(scale_columns));
}

int32_t check_tensor(const Shape &shape, const char *name, const void *pointer, int32_t type) {
    if (!is_float(type)) {
        return fail(BK_CUDA_INVALID_ARGUMENT, "%s: the type of %s must be a float bk_cuda_type, got %d", shape.op, name,
                    type);
    }
    if (!pointer || reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(size_of(type)) != 0) {
        return fail(BK_CUDA_INVALID_ARGUMENT, "%s: %s must be aligned to its elements, got %p", shape.op, name,
                    pointer);
    }
    return BK_CUDA_OK;
}

}  // namespace bitlab

extern "C" {

int32_t bk_cuda_abi_version(void) { return BK_CUDA_ABI_VERSION; }

const char *bk_cuda_last_error(void) { return bitlab::last_error; }

const char *bk_cuda_architectures(void) { return BK_CUDA_ARCHITECTURES; }

}  // extern "C"
