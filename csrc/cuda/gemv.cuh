// One token, quantized by the very kernel that multiplies it: x to codes in shared memory, then packed rows against
// them with dp4a, four masks to a word.
//
// Every block makes all codes for itself: x is in L2, so that costs less than a second launch. The first packed bytes
// are on their way meanwhile. A team of 1, 2, 4 or 8 warps takes one packed row (four outputs) at a time; a lane loads
// 16 bytes of it, kDepth times in flight. Without groups only, and while the codes fit in 48 KiB; few_kernel does the
// rest. Rejected: mma with one token of eight used. It needs 16 rows to a warp, so fewer rows fill the chip.
#ifndef BITLAB_CUDA_GEMV_CUH
#define BITLAB_CUDA_GEMV_CUH

#include "activations.cuh"
#include "matmul.cuh"

namespace bitlab {

constexpr int kGemvThreads = 256;
constexpr int kGemvWarps = kGemvThreads / kWarp;
constexpr int kGemvDepth = 4;
// Shared memory after the codes: maxima, sums, then the teams' partial sums, two sets in turn.
constexpr uint32_t kGemvTail = 64 + 64 + 2 * kGemvWarps * 4 * 4;
constexpr int64_t kGemvMaxK = (kSharedBytes - kGemvTail) / 64 * 64;

struct GemvParams {
    MatmulParams matmul;  // x is null; x_scale and x_sums are made by each block for itself
    const void *x;
    int32_t x_type;
    bool x_vector;
    int32_t team;  // warps to a packed row
};

inline uint32_t gemv_shared_bytes(int64_t K) { return static_cast<uint32_t>((K + 63) / 64 * 64) + kGemvTail; }

struct RowPart {
    Bytes16 at[kGemvDepth];
};

BK_DEVICE RowPart load_part(const MatmulParams &p, int64_t row, int32_t k, int32_t step) {
    RowPart part;
    const uint8_t *bytes = p.weight + row * p.K;
    BK_UNROLL
    for (int d = 0; d < kGemvDepth; ++d) {
        const int32_t at = k + d * step;
        part.at[d] = {{0, 0, 0, 0}};
        if (at < p.K) part.at[d] = load_weight_16(bytes, at, p);
    }
    return part;
}

BK_KERNEL(kGemvThreads) gemv_kernel(GemvParams q) {
    const MatmulParams &p = q.matmul;
    const int thread = thread_x(), warp = thread / kWarp, lane = thread % kWarp;
    const int teams = kGemvWarps / q.team, team = warp / q.team;
    const int32_t padded = (p.K + 63) / 64 * 64;
    const int32_t first_k = (warp % q.team * kWarp + lane) * 16, step = q.team * kWarp * 16;
    const uint32_t maxima = static_cast<uint32_t>(padded), sums_at = maxima + 64, partial = maxima + 128;

    int64_t row = block_x() * teams + team;
    RowPart part = load_part(p, row < p.weight_rows ? row : p.weight_rows - 1, first_k, step);

    uint32_t most = 0;
    float values[8];
    for (int32_t k = thread * 8; k < p.K; k += kGemvThreads * 8) {
        load_eight(q.x, q.x_type, k, p.K, q.x_vector, values);
        most = most_of(values, most);
    }
    const Scaling by = scaling_of(block_max(most, maxima, kGemvThreads));
    int32_t sum = 0;
    for (int32_t k = thread * 8; k < padded; k += kGemvThreads * 8) {
        load_eight(q.x, q.x_type, k, p.K, q.x_vector, values);
        store_shared(static_cast<uint32_t>(k), encode_eight(values, by, sum));
    }
    // Its barrier is also the one between writing the codes and reading them.
    sum = block_sum(sum, sums_at, kGemvThreads);

    int set = 0;
    for (int64_t first_row = block_x() * teams; first_row < p.weight_rows; first_row += grid_x() * teams) {
        row = first_row + team;
        const int64_t clamped = row < p.weight_rows ? row : p.weight_rows - 1;
        int32_t acc[4] = {};
        for (int32_t k = first_k; k < p.K; k += kGemvDepth * step) {
            BK_UNROLL
            for (int d = 0; d < kGemvDepth; ++d) {
                const int32_t at = k + d * step;
                if (at >= p.K) continue;
                const Bytes16 x = load_shared<Bytes16>(static_cast<uint32_t>(at));
                BK_UNROLL
                for (int w = 0; w < 4; ++w) {
                    BK_UNROLL
                    for (int i = 0; i < 4; ++i) acc[i] = dot4_us(part.at[d].word[w] & lane_mask(i), x.word[w], acc[i]);
                }
            }
            const int32_t next = k + kGemvDepth * step;
            if (next < p.K) part = load_part(p, clamped, next, step);
        }
        const int64_t next_row = row + grid_x() * teams;
        if (next_row < p.weight_rows) part = load_part(p, next_row, first_k, step);

        // Four sums over 32 lanes: halve what each lane keeps twice, then add up what is left.
        const bool upper = lane & 1, second = lane & 2;
        int32_t a = (upper ? acc[2] : acc[0]) + shuffle_xor(upper ? acc[0] : acc[2], 1);
        const int32_t b = (upper ? acc[3] : acc[1]) + shuffle_xor(upper ? acc[1] : acc[3], 1);
        a = (second ? b : a) + shuffle_xor(second ? a : b, 2);
        a += shuffle_xor(a, 4);
        a += shuffle_xor(a, 8);
        a += shuffle_xor(a, 16);
        const int kept = 2 * (lane & 1) + (lane >> 1 & 1);
        const uint32_t slot = partial + static_cast<uint32_t>(set * kGemvWarps * 16);
        if (lane < 4) store_shared(slot + static_cast<uint32_t>(warp * 16 + kept * 4), a);
        sync_block();
        if (thread < teams * 4) {
            const int i = thread % 4;
            const int64_t r = first_row + thread / 4, n = r + i * p.weight_rows;
            int32_t total = 0;
            for (int w = 0; w < q.team; ++w) {
                total += load_shared<int32_t>(slot + static_cast<uint32_t>((thread / 4 * q.team + w) * 16 + i * 4));
            }
            if (r < p.weight_rows && n < p.N) {
                const float scale = load_global(p.weight_scale + (p.scale_rows == 1 ? 0 : n));
                const float value = static_cast<float>(unshift(total, i) - sum);
                finish_value(p, 0, n, multiply(value, multiply(by.scale, scale)));
            }
        }
        // The next row's sums go to the other set, so that one barrier a row is enough.
        set ^= 1;
    }
}

}  // namespace bitlab

#endif
