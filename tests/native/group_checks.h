// Scales of groups in two levels: multiplying at every border of the kernels, extremes, packing, unpacking, what is
// refused.
#ifndef BITLAB_TESTS_GROUP_CHECKS_H
#define BITLAB_TESTS_GROUP_CHECKS_H

#include <initializer_list>

#include "linear_checks.h"

namespace harness {

constexpr Group kTwoLevels[] = {{64, true}, {128, true}};

inline void check_linears(const Shape &s, const Options &o) {
    begin_linear("linear_i8_t2", s, o);
    check_linear_i8(Linear(s, o, 1));
    Options floats = o;
    floats.per_tensor = false;
    begin_linear("linear_f32_t2", s, floats);
    check_linear_f32(Linear(s, floats, BK_FLOAT_PLANES));
}

// Every number of tokens at which a kernel goes another way: what it takes at once, the switches to panels, the tiles
// and the parts of many tokens; of float activations a token is four rows of codes.
inline void test_group_tokens(bool quick) {
    constexpr int64_t kM[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  12, 13, 16, 17, 19, 20,  21,  22,
                              23, 24, 25, 29, 31, 32, 33, 47, 48, 49, 65, 72, 73, 96, 287, 288, 289};
    // Numbers without a common divisor, so that every pair comes up in time; of many tokens the smaller ones.
    constexpr int64_t kN[] = {1, 3, 5, 17, 66, 63, 130};
    constexpr int64_t kK[] = {64, 128, 192, 256, 320, 384, 640, 1152};
    constexpr int32_t kTypes[] = {BK_F32, BK_BF16, BK_F16};
    unsigned turn = 0;
    for (int64_t M : kM) {
        const bool many = M > 25;
        for (const Group &group : kTwoLevels) {
            for (int i = 0; i < (many ? 1 : 2); ++i) {
                ++turn;
                if (quick && turn % 3 != 0) continue;
                const Shape s = {M, kN[turn % (many ? 4 : 7)], kK[turn * 3 % (many ? 4 : 8)]};
                if (s.K % group.size != 0) continue;
                check_linears(s, {kTypes[turn % 3], kTypes[turn / 3 % 3], static_cast<int32_t>(turn % 4) - 1, group,
                                  turn % 5 == 0, false});
            }
        }
    }
}

// Rows that are taken in parts: words of more groups than are made at once, codes of more tokens than a cache holds.
inline void test_group_parts(bool quick) {
    constexpr Shape kShapes[] = {{1, 5, 16384}, {1, 6, 16512}, {3, 5, 33024},
                                 {8, 5, 5248},  {9, 5, 29696}, {6, 18, 17024}};
    for (const Shape &s : kShapes) {
        for (const Group &group : kTwoLevels) {
            if (quick && (s.M + group.size) % 3 == 0) continue;
            check_linears(s, {BK_BF16, BK_F32, BK_F32, group, false, false});
        }
    }
}

// Multipliers of 127, codes of activations and weights at their ends: sums as large as they can be, in every lane.
inline void test_group_extremes(const Shape &s, const Group &group, int8_t weight) {
    const Options o = {BK_F32, BK_F32, -1, group, false, false};
    // Its three lower digits are at their limits.
    const float most = static_cast<float>(0x3F808080);
    for (float sign : {1.0f, -1.0f}) {
        begin_linear("linear_i8_t2 of extremes", s, o);
        Linear bytes(s, o, 1, 0);
        bytes.constant(sign * most, weight);
        check_linear_i8(bytes);
        // With M tokens four times as many rows of codes.
        const Shape fewer = {(s.M + 3) / 4, s.N, s.K};
        begin_linear("linear_f32_t2 of extremes", fewer, o);
        Linear floats(fewer, o, BK_FLOAT_PLANES, 0);
        floats.constant(sign * most, weight);
        check_linear_f32(floats);
    }
}

// Every multiplier of a weight alone, in every lane and place of a group.
inline void test_each_multiplier() {
    for (const Group &group : kTwoLevels) {
        for (int64_t M : {1, 26}) {
            const Shape s = {M, 128, 2 * group.size};
            const Options o = {BK_F32, BK_F32, -1, group, false, false};
            begin_linear("linear_i8_t2 of each multiplier", s, o);
            Linear linear(s, o, 1);
            for (int64_t n = 0; n < s.N; ++n) {
                linear.multiplier[2 * n] = static_cast<uint8_t>(n);
                linear.multiplier[2 * n + 1] = static_cast<uint8_t>(127 - n);
            }
            check_linear_i8(linear);
        }
    }
}

// Groups of a few sizes in a row, among them what rounds to a multiplier of 0 and what lies between two.
inline void fill_groups(void *weight, int32_t type, int64_t N, int64_t K, int64_t group) {
    constexpr float kSizes[] = {1.0f, 0.3f, 1e-3f, 0.5f, 1e-6f, 0.70f};
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k) {
            const float size = kSizes[(n + k / group * 5) % 6] * 0.04f;
            reference::store(weight, type, n * K + k, size * random_float(3));
        }
    }
    // Scales of 127, 63.5 and 2.5 to 1: quotients that are ties, or near them.
    if (N > 4 && K >= 3 * group) {
        for (int64_t k = 0; k < K; ++k) {
            const float size = k < group ? 127.0f : k < 2 * group ? 63.5f : 2.5f;
            reference::store(weight, type, 4 * K + k, k % 2 ? size : -size);
        }
    }
    if (N > 5) set_row(weight, type, K, 5, K, type == BK_F16 ? 65504.0f : 3.3e38f);
}

inline void test_pack_groups(const Shape &s, int32_t type, const Group &group, bool invalid) {
    begin("pack_groups N %lld K %lld, type %d, group %lld, invalid %d", number(s.N), number(s.K), type,
          number(group.size), invalid);
    const int64_t columns = group.columns(s.K), R = (s.N + 3) / 4;
    void *weight = elements(type, s.N * s.K);
    fill_groups(weight, type, s.N, s.K, group.size);
    if (s.N > 2) set_row(weight, type, s.K, 2, s.K, 0.0f);
    if (invalid) reference::store(weight, type, s.K / 2, reference::nan());
    if (invalid && s.N > 3) reference::store(weight, type, 4 * s.K - 1, reference::float_of(0xFF800000u));
    auto *row = input<float>(s.N);
    auto *multiplier = input<uint8_t>(s.N * columns);
    auto *qweight = input<uint8_t>(R * s.K);
    auto *own = array<float>(columns);
    auto *w = array<int8_t>(s.N * s.K);
    for (int64_t n = 0; n < s.N; ++n) {
        for (int64_t g = 0; g < columns; ++g) {
            const double sum = reference::abs_sum(weight, type, n * s.K + g * group.size, group.size);
            own[g] = reference::weight_scale(&sum, 1, group.size);
        }
        reference::two_levels(own, columns, row + n, multiplier + n * columns);
        for (int64_t k = 0; k < s.K; ++k) {
            const float step = static_cast<float>(multiplier[n * columns + k / group.size]) * row[n];
            w[n * s.K + k] = reference::ternarize(reference::load(weight, type, n * s.K + k), step);
        }
    }
    reference::pack(w, qweight, s.N, s.K, 0);
    unsigned char *got_row = output(4 * s.N, 4);
    unsigned char *got_multiplier = output(s.N * columns, 1);
    unsigned char *got = output(R * s.K, 1);
    on_every_isa(
        [&] {
            return bk_cpu_pack_groups_t2(weight, type, reinterpret_cast<float *>(got_row), got_multiplier, got, s.N,
                                         s.K, columns, threads);
        },
        [&] {
            expect(got_row, row, BK_F32, s.N, 1);
            expect(got_multiplier, multiplier, kI8, s.N, columns);
            expect(got, qweight, kI8, R, s.K);
        });
}

// One product of the code times its multiplier and the scale, for a block that begins and ends within groups.
inline void test_unpack_groups(const Shape &s, int32_t type, const Group &group) {
    begin("unpack N %lld K %lld, type %d, group %lld in two levels", number(s.N), number(s.K), type,
          number(group.size));
    const int64_t columns = group.columns(s.K), R = (s.N + 3) / 4;
    auto *w = array<int8_t>(s.N * s.K);
    fill_ternary(w, s.N * s.K);
    const uint8_t *qweight = packed(w, s.N, s.K);
    auto *values = input<float>(s.N);
    fill_scales(values, s.N);
    const Scales scales = {values, s.N, columns, fill_multipliers(s.N * columns)};
    void *unpacked = array<unsigned char>(4 * R * s.K * size_of(type));
    for (int part = 0; part < 2; ++part) {
        const int64_t r0 = part ? R / 3 : 0, r1 = part ? R - R / 4 : R;
        const int64_t k0 = part ? s.K / 5 : 0, k1 = part ? s.K - s.K / 7 : s.K;
        const int64_t height = r1 - r0, width = k1 - k0;
        output_count = 0;
        unsigned char *block = output(4 * height * width * size_of(type), size_of(type));
        memset(unpacked, kPoison, static_cast<size_t>(4 * height * width * size_of(type)));
        for (int64_t i = 0; i < 4 * height * width; ++i) {
            const int64_t n = i / (height * width) * R + r0 + i / width % height, k = k0 + i % width;
            if (n >= s.N) continue;
            const int32_t code = w[n * s.K + k] * scales.factor(n, k / group.size);
            reference::store(unpacked, type, i, static_cast<float>(code) * values[n]);
        }
        on_every_isa(
            [&] {
                return bk_cpu_unpack_t2(qweight, values, s.N, columns, scales.multiplier, block, type, s.N, s.K, r0, r1,
                                        k0, k1, threads);
            },
            [&] { expect(block, unpacked, type, 4 * height, width); });
    }
}

inline void test_groups(bool quick) {
    test_group_tokens(quick);
    test_group_parts(quick);
    test_each_multiplier();
    for (int8_t weight : {int8_t{1}, int8_t{-1}}) {
        for (const Group &group : kTwoLevels) {
            for (int64_t M : {1, 3, 9, 26}) test_group_extremes({M, 17, 1152}, group, weight);
            // The most columns that groups divide: 64 times 2047, 128 times 1023.
            if ((weight < 0) != (group.size == 128)) continue;
            const int64_t most = BK_MAX_IN_FEATURES / group.size * group.size;
            test_group_extremes({1, 5, most}, group, weight);
            test_group_extremes({26, 2, most}, group, weight);
        }
    }
    constexpr Shape kWeights[] = {{0, 1, 128}, {0, 5, 384}, {0, 6, 1152}, {0, 66, 640}, {0, 3, 16640}};
    for (int32_t type : {BK_F32, BK_BF16, BK_F16}) {
        for (const Group &group : kTwoLevels) {
            for (const Shape &s : kWeights) {
                test_pack_groups(s, type, group, false);
                test_pack_groups(s, type, group, true);
                test_unpack_groups(s, type, group);
            }
        }
        test_pack_groups({0, 5, 64}, type, kTwoLevels[0], false);
        test_pack_groups({0, 9, 192}, type, kTwoLevels[0], true);
        test_unpack_groups({0, 9, 192}, type, kTwoLevels[0]);
    }
    test_pack_groups({0, 2, 131008}, BK_F32, kTwoLevels[0], false);
}

// Whether a call was refused with this text.
inline bool refused(int32_t status, const char *text) {
    if (status == BK_INVALID_ARGUMENT && strcmp(bk_cpu_last_error(), text) == 0) return true;
    printf("FAIL: got status %d with \"%s\", want \"%s\"\n", status, bk_cpu_last_error(), text);
    return false;
}

// What groups must not be; nothing is read before that is known.
inline bool refuses_groups() {
    static constexpr char kWidth[] = "groups with multipliers must be of 64 or 128 columns";
    static constexpr char kRows[] = "scale_rows must be N for per-group scales";
    static constexpr char kDivide[] = "scale_columns must be 0 or divide K";
    struct Case {
        int64_t K, rows, columns;
        const char *text;
    };
    constexpr Case kCases[] = {
        {192, 8, 0, kWidth},
        {192, 1, 0, "scale_rows must be N beside multipliers"},
        {192, 8, 1, kWidth},
        {512, 8, 2, kWidth},
        {192, 1, 3, kRows},
        {192, 8, 2, "the group size is not a multiple of the vector width"},
        {192, 8, 5, kDivide},
        {192, 8, -3, kDivide},
        {192, 7, 3, "scale_rows must be 1 or N"},
    };
    uint8_t multiplier = 1, qweight = 0;
    float scale = 1.0f;
    bool all = true;
    for (const Case &c : kCases) {
        bk_linear_args args = {};
        args.qweight = &qweight;
        args.weight_scale = &scale;
        args.multiplier = &multiplier;
        args.scale_rows = c.rows;
        args.scale_columns = c.columns;
        args.N = 8;
        args.K = c.K;
        args.M = 1;
        all = refused(bk_cpu_linear_i8_t2(&args), c.text) && all;
        all = refused(bk_cpu_linear_f32_t2(&args), c.text) && all;
        // Unpacking has no vectors that would have to divide a group.
        const char *text = c.columns == 2 && c.K == 192 ? kWidth : c.text;
        all = refused(bk_cpu_unpack_t2(&qweight, &scale, c.rows, c.columns, &multiplier, &scale, BK_F32, 8, c.K, 0, 0,
                                       0, 0, 1),
                      text) &&
              all;
        if (c.rows != 8) continue;
        all = refused(bk_cpu_pack_groups_t2(&scale, BK_F32, &scale, &multiplier, &qweight, 8, c.K, c.columns, 1),
                      c.text) &&
              all;
    }
    bk_linear_args args = {};
    args.multiplier = &multiplier;
    args.scale_rows = 8;
    args.N = 8;
    args.K = 64;
    all = refused(bk_cpu_linear_i8_i8(&args), "int8 weights must have a scale a row") && all;
    args.scale_columns = 1;
    all = bk_cpu_linear_i8_t2(&args) == BK_OK && all;
    all = refused(bk_cpu_pack_groups_t2(&scale, 7, &scale, &multiplier, &qweight, 8, 64, 1, 1),
                  "weight_type must be a bk_type") &&
          all;
    return refused(bk_cpu_pack_groups_t2(&scale, BK_F32, &scale, &multiplier, &qweight, 8, 131072, 2048, 1),
                   "K must be at most 131071") &&
           all;
}

}  // namespace harness

#endif
