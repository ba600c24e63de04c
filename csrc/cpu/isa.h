// What an instruction set provides: the table that the C functions dispatch through.
#ifndef BITLAB_CPU_ISA_H
#define BITLAB_CPU_ISA_H

#include <stddef.h>
#include <stdint.h>

namespace bitlab {

// Codes of a token are padded with zeros to a multiple of this, so that vector loops need no tail on the activations.
constexpr int64_t kPadK = 64;
// Packed rows that one task handles: the weight rows of its four lanes are written as four contiguous runs.
constexpr int64_t kBlock = 16;
constexpr int64_t kBlockOutputs = 4 * kBlock;
// Columns of a block that are unpacked at once for many tokens: with the tokens' codes they stay in the L1 cache.
constexpr int64_t kPanelK = 256;
// Tokens whose sums a task keeps at once; a multiple of BK_FLOAT_PLANES times the tokens of every tile.
constexpr int64_t kMostTokens = 288;
// Every instruction set unpacks from at least this many rows of codes on, and from at most that many.
constexpr int64_t kLeastPanel = 8;
constexpr int64_t kMostDirect = 48;
// Rows of codes that stand side by side in a panel, at most.
constexpr int64_t kMostPanelTokens = 8;

typedef uint8_t U8x16 __attribute__((vector_size(16)));

// Sixteen bytes, zeros after the first `count`, which alone are read.
static inline U8x16 copied_16(const uint8_t *from, int64_t count) {
    U8x16 bytes = {};
    if (count >= 16) {
        __builtin_memcpy(&bytes, from, 16);
    } else {
        for (int64_t i = 0; i < count; ++i) bytes[i] = from[i];
    }
    return bytes;
}

constexpr int64_t padded(int64_t K) { return (K + kPadK - 1) / kPadK * kPadK; }

// Rows of codes are tokens, or with planes == BK_FLOAT_PLANES the digits of one token after the other, lowest first.
struct Activations {
    const int8_t *codes;   // [rows, padded(K)]
    const int8_t *panels;  // the same as interleave() lays them out, from panel_from rows on; else null
    const float *scale;    // [M]: of the codes; with planes the exponent of the lowest digit
    const int32_t *sums;   // [rows, columns]: the sum of the codes of each group of K
    int64_t columns;       // groups along K; 1 unless the weight scales are per group
    int64_t planes;
};

struct LinearArgs {
    Activations x;
    const uint8_t *qweight;
    const float *weight_scale;
    int64_t scale_rows;
    bool grouped;               // weight_scale is [N, x.columns]
    const uint8_t *multiplier;  // [N, K / group], or null
    int64_t group;              // columns of one: 64 or 128
    const void *bias;
    int32_t bias_type;
    void *y;
    int32_t y_type;  // BK_I32: y is [M, N] of the exact sums
    int64_t M, N, K;
    const int64_t *rows = nullptr;  // y's row of each token, where it is not its own number
};

constexpr int32_t kI32 = -1;

struct PackArgs {
    const void *weight;  // const or not, by the function
    int32_t type;
    const float *weight_scale;
    int64_t scale_rows, columns;  // columns: groups along K
    uint8_t *qweight;
    int64_t N, K;
    const uint8_t *multiplier;  // [N, columns], or null: then weight_scale is [N]
};

// Where pack_groups() writes scales.
struct GroupScales {
    float *row;           // [N]
    uint8_t *multiplier;  // [N, columns]
};

struct LearnedArgs {
    const void *dw;
    int32_t dw_type;
    const void *weight;
    int32_t weight_type;
    void *gradient;  // of weight_type
};

struct Block {
    int64_t first_row, last_row, first_column, last_column;
};

// Memory of one thread for linear() with kLeastPanel rows of codes or more, aligned to 64.
struct Scratch {
    alignas(64) uint8_t panel[4 * kBlock * kPanelK];
    int32_t acc[kMostTokens * kBlockOutputs];
    float totals[kMostTokens * kBlockOutputs];
};

struct Kernels {
    const char *name;
    bool (*supported)();
    // Returns max|x| of a row; NaN if the row holds NaN.
    float (*absmax)(const void *x, int32_t type, int64_t K);
    // codes[0..K) = round(x * a), where a is at most 127 / max|x| rounded; zeros up to padded_to; sums[c] = the sum
    // over the c-th of `columns` parts.
    void (*quantize)(const void *x, int32_t type, float a, int64_t K, int64_t padded_to, int8_t *codes, int32_t *sums,
                     int64_t columns);
    // The BK_FLOAT_PLANES digits of round(x * factor), each as quantize() writes them.
    void (*quantize_planes)(const void *x, int32_t type, double factor, int64_t K, int64_t padded_to, int8_t *codes,
                            int32_t *sums, int64_t columns);
    // Rows of codes from which linear() takes them as panels; how many of them a panel holds.
    int64_t panel_from, panel_tokens;
    // Whether linear() with multipliers wants the sum of the codes of each group, or of a whole token.
    bool group_sums;
    // Lays rows of codes out as panels, `stride` columns each.
    void (*interleave)(const int8_t *codes, int64_t stride, int64_t rows, int8_t *panels);
    // The fused linear for packed rows [first, last); scratch may be null where there are no panels.
    void (*linear)(const LinearArgs &args, int64_t first, int64_t last, Scratch *scratch);
    // The fused linear with int8 weights for rows [first, last).
    void (*linear_i8)(const LinearArgs &args, int64_t first, int64_t last);
    // Whether any code of `count` packed bytes is 3.
    bool (*has_invalid)(const uint8_t *qweight, int64_t count);
    // float64 sum of |w| over count elements, in the order that bitkernels.h fixes.
    double (*abs_sum)(const void *weight, int32_t type, int64_t offset, int64_t count);
    // Ternarizes packed rows [first, last).
    void (*pack)(const PackArgs &args, int64_t first, int64_t last);
    // Estimates scales of groups in two levels for packed rows [first, last), and ternarizes them.
    void (*pack_groups)(const PackArgs &args, const GroupScales &scales, int64_t first, int64_t last);
    // Unpacks rows [first, last) of a block into args.weight.
    void (*unpack)(const PackArgs &args, const Block &block, int64_t first, int64_t last);
    // Writes the weight's gradient of `count` elements that share a learned scale; returns the float64 sum that its
    // gradient comes from, in the order that bitkernels.h fixes.
    double (*learned)(const LearnedArgs &args, int64_t offset, int64_t count, float step);
};

extern const Kernels kKernelsPortable;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvxVnni;
extern const Kernels kKernelsAvx512Bw;
extern const Kernels kKernelsAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kKernelsNeonDotprod;
extern const Kernels kKernelsNeonI8mm;
#endif

}  // namespace bitlab

#endif
