// The device layer on the CPU, over the emulator; see csrc/cuda/device.h for what each function promises.
#ifndef BITLAB_TEST_DEVICE_HOST_H
#define BITLAB_TEST_DEVICE_HOST_H

#include <math.h>
#include <string.h>

#include "emulator.h"

#define BK_KERNEL(...) inline void
#define BK_DEVICE inline
#define BK_UNROLL
#define BK_UNROLL_BY_8
#define BK_UNROLL_BY_16
#define BK_NO_UNROLL
#define BK_HAS_WGMMA 1
#define BK_HAS_CLUSTERS 1
#define BK_SITE \
    emulator::Site { file, line }
#define BK_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace bitlab {

inline int thread_x() { return emulator::current().thread; }
inline int64_t block_x() { return emulator::current().block_x; }
inline int block_y() { return emulator::current().block_y; }
inline int64_t grid_x() { return emulator::current().grid_x; }

inline void start_next() {}
inline void wait_for_previous() { emulator::wait_for_previous(); }
inline void prefetch(const void *) {}

template <typename T>
T load_global(const T *p, BK_WHERE) {
    emulator::check_global(p, sizeof(T), false, BK_SITE);
    return *p;
}
inline Bytes16 load_weights(const void *p, BK_WHERE) {
    return load_global(static_cast<const Bytes16 *>(p), file, line);
}
template <typename T>
void store_global(T *p, T value, BK_WHERE) {
    emulator::check_global(p, sizeof(T), true, BK_SITE);
    *p = value;
}

template <typename T>
T load_shared(uint32_t offset, BK_WHERE) {
    T value;
    memcpy(&value, emulator::read_shared(offset, sizeof(T), BK_SITE), sizeof(T));
    return value;
}
template <typename T>
void store_shared(uint32_t offset, T value, BK_WHERE) {
    memcpy(emulator::write_shared(offset, sizeof(T), BK_SITE), &value, sizeof(T));
}

inline void copy_async_16(uint32_t offset, const void *p, int valid, BK_WHERE) {
    emulator::copy_async(offset, p, 16, valid, BK_SITE);
}
inline void copy_async_4(uint32_t offset, const void *p, int valid, BK_WHERE) {
    emulator::copy_async(offset, p, 4, valid, BK_SITE);
}
inline void commit_async() { emulator::commit_async(); }
template <int N>
void wait_async() {
    emulator::wait_async(N);
}

inline void sync_block(BK_WHERE) { emulator::sync_block(BK_SITE); }
inline void sync_warp(BK_WHERE) {
    emulator::Exchange exchange{};
    emulator::collective(emulator::Op::kSyncWarp, exchange, BK_SITE);
}
template <typename T>
T shuffled(emulator::Op op, T value, int argument, emulator::Site site) {
    emulator::Exchange exchange{};
    memcpy(&exchange.in[0], &value, sizeof(T));
    exchange.in[1] = static_cast<uint64_t>(argument);
    emulator::collective(op, exchange, site);
    memcpy(&value, &exchange.out[0], sizeof(T));
    return value;
}
template <typename T>
T shuffle_xor(T value, int mask, BK_WHERE) {
    return shuffled(emulator::Op::kShuffleXor, value, mask, BK_SITE);
}
template <typename T>
T shuffle(T value, int lane, BK_WHERE) {
    return shuffled(emulator::Op::kShuffle, value, lane, BK_SITE);
}

template <typename T>
void mma(emulator::Op op, T (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulator::Site site) {
    emulator::Exchange exchange{};
    for (int i = 0; i < 4; ++i) exchange.in[i] = a[i];
    exchange.in[4] = b0;
    exchange.in[5] = b1;
    for (int i = 0; i < 4; ++i) memcpy(&exchange.in[6 + i], &d[i], 4);
    emulator::collective(op, exchange, site);
    for (int i = 0; i < 4; ++i) memcpy(&d[i], &exchange.out[i], 4);
}
inline void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BK_WHERE) {
    mma(emulator::Op::kMmaU8S8, d, a, b0, b1, BK_SITE);
}
inline void mma_u8s8_wrapping(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BK_WHERE) {
    mma(emulator::Op::kMmaU8S8Wrapping, d, a, b0, b1, BK_SITE);
}
inline void mma_s8s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BK_WHERE) {
    mma(emulator::Op::kMmaS8S8, d, a, b0, b1, BK_SITE);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BK_WHERE) {
    mma(emulator::Op::kMmaBf16, d, a, b0, b1, BK_SITE);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BK_WHERE) {
    mma(emulator::Op::kMmaF16, d, a, b0, b1, BK_SITE);
}

inline bool has_clusters() { return emulator::is_hopper(); }
inline int cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_arrive(BK_WHERE) { emulator::cluster_arrive(BK_SITE); }
inline void cluster_wait(BK_WHERE) { emulator::cluster_wait(BK_SITE); }
inline void open_inbox(uint32_t offset, BK_WHERE) { emulator::open_inbox(offset, BK_SITE); }
inline void expect(uint32_t inbox, uint32_t bytes, BK_WHERE) { emulator::expect(inbox, bytes, BK_SITE); }
inline void wait_inbox(uint32_t inbox, int round, BK_WHERE) { emulator::wait_inbox(inbox, round, BK_SITE); }
template <typename T>
void send(int rank, uint32_t offset, T value, uint32_t inbox, BK_WHERE) {
    emulator::send(rank, offset, &value, sizeof(T), inbox, BK_SITE);
}

inline bool has_wgmma() { return emulator::is_hopper(); }
inline uint32_t shared_address(uint32_t offset) { return offset; }
inline void wgmma_u8s8(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool onto, BK_WHERE) {
    emulator::wgmma(d, a, b, onto, false, BK_SITE);
}
inline void wgmma_u8s8_wrapping(int32_t (&d)[32], const uint32_t (&a)[4], uint64_t b, bool onto, BK_WHERE) {
    emulator::wgmma(d, a, b, onto, true, BK_SITE);
}
inline void wgmma_fence(BK_WHERE) { emulator::wgmma_fence(BK_SITE); }
inline void wgmma_commit(BK_WHERE) { emulator::wgmma_commit(BK_SITE); }
template <int N>
void wgmma_wait(BK_WHERE) {
    emulator::wgmma_wait(N, BK_SITE);
}
inline void wgmma_take(int32_t (&d)[32], BK_WHERE) { emulator::wgmma_take(d, BK_SITE); }
inline void fence_async_proxy() { emulator::fence_async_proxy(); }

inline uint32_t opaque(uint32_t value) { return value; }
inline int32_t dot4_us(uint32_t a, uint32_t b, int32_t c) {
    for (int i = 0; i < 4; ++i) {
        c += static_cast<int32_t>((a >> (8 * i)) & 255) * static_cast<int8_t>((b >> (8 * i)) & 255);
    }
    return c;
}
inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= static_cast<uint32_t>((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 255) << (8 * i);
    }
    return result;
}

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline double add(double a, double b) { return a + b; }
inline double divide(double a, double b) { return a / b; }
inline int32_t round_even(float value) { return static_cast<int32_t>(nearbyintf(value)); }
inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline float decode_bf16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }
inline uint16_t encode_bf16(float value) {
    if (value != value) return 0x7FFF;
    const uint32_t bits = float_bits(value);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float decode_f16(uint16_t bits) {
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    float value = exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                                : ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
    if (exponent == 31) value = fraction ? NAN : INFINITY;
    return bits & 0x8000 ? -value : value;
}
inline uint16_t encode_f16(float value) {
    if (value != value) return 0x7FFF;
    const uint32_t sign = signbit(value) ? 0x8000 : 0;
    const float magnitude = fabsf(value);
    if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
    const int exponent = magnitude < 0x1p-14f ? -14 : ilogbf(magnitude);
    const int fraction = static_cast<int>(nearbyintf(ldexpf(magnitude, 10 - exponent)));
    // Subnormals and a carry into the exponent come out right by addition.
    return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + fraction));
}

inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int i = 0; i < 2; ++i) {
        const auto half = [i](uint32_t v) { return decode_bf16(static_cast<uint16_t>(v >> (16 * i))); };
        result |= static_cast<uint32_t>(encode_bf16(half(a) * half(b) + half(c))) << (16 * i);
    }
    return result;
}
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int i = 0; i < 2; ++i) {
        const auto half = [i](uint32_t v) { return decode_f16(static_cast<uint16_t>(v >> (16 * i))); };
        result |= static_cast<uint32_t>(encode_f16(half(a) * half(b) + half(c))) << (16 * i);
    }
    return result;
}

template <typename P>
const char *launch(void (*kernel)(P), Grid grid, int threads, uint32_t shared_bytes, void *, P params,
                   int cluster = 1) {
    return emulator::run(grid.x, grid.y, threads, shared_bytes, cluster, [=] { kernel(params); });
}

}  // namespace bitlab

#endif
