// What the lanes of a warp give each other: mma by the fragment tables, and shuffles.
#include <string.h>

#include "emulator.h"
#include "fragments.h"

namespace emulator {
namespace {

template <typename T>
T as(uint64_t value) {
    T result;
    memcpy(&result, &value, sizeof(T));
    return result;
}

float bf16(uint16_t bits) { return as<float>(static_cast<uint64_t>(bits) << 16); }

float f16(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    double value = exponent == 0 ? fraction * 0x1p-24 : (1024 + fraction) * __builtin_ldexp(1.0, exponent - 25);
    if (exponent == 31) value = fraction ? __builtin_nan("") : __builtin_inf();
    return static_cast<float>(bits & 0x8000 ? -value : value);
}

// Elements of 8 or 16 bits of a lane's registers.
template <typename T>
T element(const uint64_t *registers, int i) {
    constexpr int per = 4 / sizeof(T);
    return static_cast<T>(registers[i / per] >> (8 * sizeof(T) * (i % per)));
}

void multiply_integers(Exchange *const (&lanes)[kLanes], bool is_signed, bool wraps) {
    int32_t a[16][32], b[32][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t *in = lanes[lane]->in;
        for (int i = 0; i < 16; ++i) {
            const Place p = a_k32(lane, i);
            a[p.row][p.column] = is_signed ? element<int8_t>(in, i) : element<uint8_t>(in, i);
        }
        for (int i = 0; i < 8; ++i) {
            const Place p = b_k32(lane, i);
            b[p.row][p.column] = element<int8_t>(in + 4, i);
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const Place p = c_place(lane, i);
            int64_t sum = as<int32_t>(lanes[lane]->in[6 + i]);
            for (int k = 0; k < 32; ++k) sum += a[p.row][k] * b[k][p.column];
            if (!wraps && sum != static_cast<int32_t>(sum)) fault("an int32 sum of mma overflows");
            lanes[lane]->out[i] = static_cast<uint32_t>(sum);
        }
    }
}

void multiply_floats(Exchange *const (&lanes)[kLanes], float (*decode)(uint16_t)) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t *in = lanes[lane]->in;
        for (int i = 0; i < 8; ++i) {
            const Place p = a_k16(lane, i);
            a[p.row][p.column] = decode(element<uint16_t>(in, i));
        }
        for (int i = 0; i < 4; ++i) {
            const Place p = b_k16(lane, i);
            b[p.row][p.column] = decode(element<uint16_t>(in + 4, i));
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const Place p = c_place(lane, i);
            double sum = as<float>(lanes[lane]->in[6 + i]);
            for (int k = 0; k < 16; ++k) sum += a[p.row][k] * b[k][p.column];
            const float rounded = static_cast<float>(sum);
            uint32_t bits;
            memcpy(&bits, &rounded, 4);
            lanes[lane]->out[i] = bits;
        }
    }
}

}  // namespace

void exchange(Op op, Exchange *const (&lanes)[kLanes]) {
    switch (op) {
        case Op::kMmaU8S8:
        case Op::kMmaU8S8Wrapping:
        case Op::kMmaS8S8:
            multiply_integers(lanes, op == Op::kMmaS8S8, op == Op::kMmaU8S8Wrapping);
            break;
        case Op::kMmaBf16:
            multiply_floats(lanes, bf16);
            break;
        case Op::kMmaF16:
            multiply_floats(lanes, f16);
            break;
        case Op::kShuffleXor:
        case Op::kShuffle:
            for (int lane = 0; lane < kLanes; ++lane) {
                const int argument = static_cast<int>(lanes[lane]->in[1]);
                const int from = op == Op::kShuffle ? argument & 31 : (lane ^ argument) & 31;
                lanes[lane]->out[0] = lanes[from]->in[0];
            }
            break;
        default:
            break;
    }
}

}  // namespace emulator
