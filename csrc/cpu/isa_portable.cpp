// Portable C++: right everywhere, and what the other instruction sets are compared with.
#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

constexpr int kTokens = 2;

template <int T>
void dot(const uint8_t *w, const int8_t *x, int64_t x_stride, int64_t k, int32_t raw[4][T]) {
    int32_t acc[4][T] = {};
    for (int64_t p = 0; p < k; ++p) {
        for (int t = 0; t < T; ++t) {
            const int32_t code = x[t * x_stride + p];
            acc[0][t] += (w[p] & 0x03) * code;
            acc[1][t] += (w[p] & 0x0C) * code;
            acc[2][t] += (w[p] & 0x30) * code;
            acc[3][t] += (w[p] & 0xC0) * code;
        }
    }
    __builtin_memcpy(raw, acc, sizeof(acc));
}

#include "loops.inl"

bool supported() { return true; }

}  // namespace

const Kernels kKernelsPortable = {"portable", supported, absmax, quantize, linear, matmul, abs_sum, pack_row};

}  // namespace bitlab
