// Compares every instruction set that the CPU has with plain versions of what bitkernels.h specifies.
//   selftest [--quick] [--without ISA]... [ISA]...     ISA: an instruction set that must be among them
// It needs the C library's printf and memory functions only, so that freestanding.cpp can stand in for that.
#include "expert_checks.h"
#include "group_checks.h"

using namespace harness;

namespace {

constexpr int32_t kTypes[] = {BK_F32, BK_BF16, BK_F16};
constexpr Group kGroups[] = {{0, false}, {1, false}, {64, false}, {128, false}, {64, true}, {128, true}};
constexpr int64_t kMostK = 20000;
constexpr int64_t kScanned[] = {0, 1, 63, 64, 65, 1000, 200000};
bool quick = false;

void check_matmul(const int8_t *codes, const int8_t *w, const int32_t *want, const Shape &s) {
    const uint8_t *qweight = packed(w, s.N, s.K);
    unsigned char *acc = output(4 * s.M * s.N, 4);
    void *work = workspace(s.M, s.K, 0, 1);
    on_every_isa(
        [&] {
            return bk_cpu_matmul_i8_t2_i32(codes, qweight, reinterpret_cast<int32_t *>(acc), s.M, s.N, s.K, work,
                                           threads);
        },
        [&] { expect(acc, want, kI32, s.M, s.N); });
}

void test_matmul(const Shape &s) {
    begin("matmul M %lld N %lld K %lld", number(s.M), number(s.N), number(s.K));
    auto *codes = input<int8_t>(s.M * s.K);
    auto *w = array<int8_t>(s.N * s.K);
    auto *want = array<int32_t>(s.M * s.N);
    fill_codes(codes, s.M * s.K);
    fill_ternary(w, s.N * s.K);
    for (int64_t i = 0; i < s.M * s.N; ++i) {
        want[i] = reference::dot(codes + i / s.N * s.K, w + i % s.N * s.K, s.K);
    }
    check_matmul(codes, w, want, s);
}

// Sums as large as they can be, in every lane.
void test_matmul_extreme(const Shape &s, int code, int weight) {
    begin("matmul of %d and %d, M %lld N %lld K %lld", code, weight, number(s.M), number(s.N), number(s.K));
    auto *codes = input<int8_t>(s.M * s.K);
    auto *w = array<int8_t>(s.N * s.K);
    auto *want = array<int32_t>(s.M * s.N);
    memset(codes, code, static_cast<size_t>(s.M * s.K));
    memset(w, weight, static_cast<size_t>(s.N * s.K));
    for (int64_t i = 0; i < s.M * s.N; ++i) want[i] = static_cast<int32_t>(code * weight * s.K);
    check_matmul(codes, w, want, s);
}

void test_quantize(const Shape &s, int32_t type, bool per_tensor, bool invalid) {
    begin("quantize_i8 M %lld K %lld, type %d, per_tensor %d, invalid %d", number(s.M), number(s.K), type, per_tensor,
          invalid);
    const int64_t stride = s.K + 3;
    auto *codes = array<int8_t>(s.M * s.K);
    auto *scale = array<float>(s.M);
    void *x = tokens(type, stride, s.M, s.K);
    fill_tokens(x, type, stride, s.M, s.K, invalid);
    reference::quantize(x, type, stride, codes, scale, s.M, s.K, per_tensor);
    unsigned char *got = output(s.M * s.K, 1);
    unsigned char *got_scale = output(4 * s.M, 4);
    on_every_isa(
        [&] {
            return bk_cpu_quantize_i8(x, type, stride, reinterpret_cast<int8_t *>(got),
                                      reinterpret_cast<float *>(got_scale), s.M, s.K, per_tensor, threads);
        },
        [&] {
            expect(got, codes, kI8, s.M, s.K);
            expect(got_scale, scale, BK_F32, s.M, 1);
        });
}

void test_invalid(int64_t count) {
    begin("find_invalid_t2, %lld bytes in the middle of three matrices", number(count));
    auto *bytes = input<uint8_t>(count);
    auto *valid = input<uint8_t>(3);
    for (int64_t b = 0; b < 3; ++b) valid[b] = 0x92;
    const uint8_t *matrices[] = {valid, bytes, valid, bytes};
    const int64_t counts[] = {3, count, 1, count};
    for (int64_t place = -1; place < count; place += count / 5 + 1) {
        for (int64_t b = 0; b < count; ++b) bytes[b] = static_cast<uint8_t>(b % 2 ? 0x92 : 0x61);
        if (place >= 0) bytes[place] = static_cast<uint8_t>(bytes[place] | 3 << (place % 4 * 2));
        const int32_t want = place >= 0 ? 1 : -1;
        int64_t found = 0;
        on_every_isa([&] { return bk_cpu_find_invalid_t2(matrices, counts, 4, &found, threads); },
                     [&] {
                         const auto got = static_cast<int32_t>(found);
                         expect(&got, &want, kI32, 1, 1);
                     });
    }
}

void test_linears() {
    // Groups of 128 take the shapes whose K they divide.
    constexpr Shape kShapes[] = {{1, 1, 1},    {1, 65, 200},  {2, 5, 64},    {3, 130, 128}, {5, 64, 65},  {7, 5, 520},
                                 {8, 65, 640}, {16, 1, 31},   {17, 64, 192}, {26, 5, 256},  {33, 65, 63}, {65, 17, 128},
                                 {33, 5, 640}, {130, 5, 384}, {300, 5, 64},  {9, 66, 512},  {75, 17, 128}};
    unsigned turn = 0;
    for (const Shape &s : kShapes) {
        for (const Group &group : kGroups) {
            if (group.size > 1 && s.K % group.size != 0) continue;
            for (int32_t x_type : kTypes) {
                ++turn;
                if (quick && turn % 3 != 0) continue;
                // Every pair of types and every bias comes up, though not with every shape.
                const Options o = {x_type, kTypes[turn % 4 % 3], static_cast<int32_t>(turn / 3 % 4) - 1,
                                   group,  turn % 5 == 0,        false};
                begin_linear("linear_i8_t2", s, o);
                check_linear_i8(Linear(s, o, 1));
                Options floats = o;
                floats.per_tensor = false;
                begin_linear("linear_f32_t2", s, floats);
                check_linear_f32(Linear(s, floats, BK_FLOAT_PLANES));
                if (group.size != 1) continue;
                floats.int8_weights = true;
                begin_linear("linear_i8_i8", s, floats);
                check_linear_i8(Linear(s, floats, 1));
            }
        }
    }
}

void test_linear_extreme(const Shape &s, int8_t weight) {
    Options o = {BK_F32, BK_F32, -1, {1, false}, false, false};
    // Its three lower digits are at their limits.
    const float most = static_cast<float>(0x3F808080) * (weight < 0 ? -1.0f : 1.0f);
    begin_linear("linear_f32_t2 of extremes", s, o);
    Linear floats(s, o, BK_FLOAT_PLANES);
    floats.constant(-most, weight);
    check_linear_f32(floats);
    o.int8_weights = true;
    begin_linear("linear_i8_i8 of extremes", s, o);
    Linear bytes(s, o, 1);
    bytes.constant(most, static_cast<int8_t>(127 * weight));
    check_linear_i8(bytes);
}

void test_weights(const Shape &s, int32_t type, const Group &group, bool invalid) {
    begin("weights N %lld K %lld, type %d, group %lld, invalid %d", number(s.N), number(s.K), type, number(group.size),
          invalid);
    const int64_t columns = group.columns(s.K);
    const int64_t groups = columns ? columns : 1;
    const int64_t rows = group.rows(s.N);
    const int64_t R = (s.N + 3) / 4;
    void *weight = elements(type, s.N * s.K);
    fill_floats(weight, type, s.N * s.K, 3);
    auto *sums = array<double>(s.N * groups);
    auto *scales = input<float>(rows * groups);
    auto *w = array<int8_t>(s.N * s.K);
    auto *qweight = input<uint8_t>(R * s.K);
    void *unpacked = array<unsigned char>(4 * R * s.K * size_of(type));
    if (s.N > 2) set_row(weight, type, s.K, 2, s.K, 0.0f);
    if (invalid) reference::store(weight, type, s.K / 2, reference::nan());
    if (invalid && s.N > 3) reference::store(weight, type, 3 * s.K, reference::float_of(0x7F800000u));
    for (int64_t i = 0; i < s.N * groups; ++i) {
        sums[i] = reference::abs_sum(weight, type, i * (s.K / groups), s.K / groups);
        if (rows > 1 || s.N == 1) scales[i] = reference::weight_scale(sums + i, 1, s.K / groups);
    }
    if (rows == 1 && !columns) scales[0] = reference::weight_scale(sums, s.N, s.N * s.K);
    unsigned char *got_scales = output(4 * rows * groups, 4);
    unsigned char *row_sums = output(8 * s.N, 8);
    on_every_isa(
        [&] {
            return bk_cpu_weight_scale(weight, type, reinterpret_cast<float *>(got_scales), rows, columns,
                                       reinterpret_cast<double *>(row_sums), s.N, s.K, threads);
        },
        [&] { expect(got_scales, scales, BK_F32, rows, groups); });

    // A tie, which goes to 0.
    if (!invalid) reference::store(weight, type, s.K - 1, 0.5f * scales[0]);
    const Scales places = {scales, rows, columns, nullptr};
    for (int64_t i = 0; i < s.N * s.K; ++i) {
        w[i] = reference::ternarize(reference::load(weight, type, i), places.at(i / s.K, i % s.K / (s.K / groups)));
    }
    reference::pack(w, qweight, s.N, s.K, 0);
    output_count = 0;
    unsigned char *got = output(R * s.K, 1);
    on_every_isa([&] { return bk_cpu_pack_t2(weight, type, scales, rows, columns, got, s.N, s.K, threads); },
                 [&] { expect(got, qweight, kI8, R, s.K); });

    // The whole, then a block that begins and ends within.
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
            reference::store(unpacked, type, i, static_cast<float>(w[n * s.K + k]) * places.at(n, k / (s.K / groups)));
        }
        on_every_isa(
            [&] {
                return bk_cpu_unpack_t2(qweight, scales, rows, columns, nullptr, block, type, s.N, s.K, r0, r1, k0, k1,
                                        threads);
            },
            [&] { expect(block, unpacked, type, 4 * height, width); });
    }
}

void test_learned(const Shape &s, int32_t dw_type, int32_t type, const Group &group, bool invalid) {
    begin("learned_gradients N %lld K %lld, types %d and %d, group %lld, invalid %d", number(s.N), number(s.K), dw_type,
          type, number(group.size), invalid);
    const int64_t columns = group.columns(s.K), rows = group.rows(s.N);
    const int64_t steps = rows * (columns ? columns : 1), parts = steps > 1 ? steps : s.N;
    const int64_t width = s.N * s.K / parts;
    void *dw = elements(dw_type, s.N * s.K);
    void *weight = elements(type, s.N * s.K);
    auto *step = input<float>(steps);
    fill_floats(dw, dw_type, s.N * s.K, 6);
    fill_floats(weight, type, s.N * s.K, 3);
    // Some weights lie on a threshold, most on either side of one, some within all.
    for (int64_t i = 0; i < steps; ++i) step[i] = static_cast<float>(reference::pow2(-1 - static_cast<int>(i % 3)));
    reference::store(weight, type, s.K / 2, 0.5f * step[0]);
    reference::store(weight, type, s.N * s.K - 1, -1.5f * step[steps - 1]);
    if (invalid) reference::store(weight, type, s.K / 3, reference::nan());
    if (invalid) reference::store(dw, dw_type, s.N * s.K - 1 - s.K / 3, reference::float_of(0x7F800000u));
    auto *want = array<unsigned char>(s.N * s.K * size_of(type));
    auto *want_steps = array<float>(steps);
    auto *sums = array<double>(parts);
    const double root = reference::square_root(static_cast<double>(s.N * s.K / steps));
    for (int64_t i = 0; i < parts; ++i) {
        sums[i] = reference::learned(dw, dw_type, weight, type, step[steps > 1 ? i : 0], want, i * width, width);
        if (steps > 1) want_steps[i] = static_cast<float>(sums[i] / root);
    }
    if (steps == 1) want_steps[0] = static_cast<float>(reference::sum_of_rows(sums, parts) / root);
    unsigned char *got = output(s.N * s.K * size_of(type), size_of(type));
    unsigned char *got_steps = output(4 * steps, 4);
    unsigned char *row_sums = output(8 * s.N, 8);
    on_every_isa(
        [&] {
            return bk_cpu_learned_gradients(dw, dw_type, weight, type, step, rows, columns, got,
                                            reinterpret_cast<float *>(got_steps), reinterpret_cast<double *>(row_sums),
                                            s.N, s.K, threads);
        },
        [&] {
            expect(got, want, type, s.N, s.K);
            expect(got_steps, want_steps, BK_F32, rows, steps / rows);
        });
}

void test_all() {
    constexpr int64_t kM[] = {1, 2, 3, 5, 7, 8, 16, 17, 33, 65, 130};
    constexpr int64_t kN[] = {1, 5, 64, 65, 130};
    constexpr int64_t kK[] = {1, 31, 63, 64, 65, 200, 520, 1100};
    constexpr Shape kWeights[] = {{0, 1, 128}, {0, 5, 256}, {0, 66, 640}};
    unsigned turn = 0;
    for (int64_t M : kM) {
        for (int64_t N : kN) {
            for (int64_t K : kK) {
                if (!quick || ++turn % 7 == 0) test_matmul({M, N, K});
            }
        }
    }
    test_matmul({300, 5, 70});
    for (int sign = -1; sign <= 1; sign += 2) {
        for (int code = -128; code <= 127; code += 255) {
            test_matmul_extreme({3, 17, 6912}, code, sign);
            test_matmul_extreme({quick ? 25 : 50, 5, 6912}, code, sign);
            test_matmul_extreme({1, 5, kMostK}, code, sign);
            test_matmul_extreme({1, 4, BK_MAX_IN_FEATURES}, code, sign);
        }
        test_linear_extreme({1, 5, 6912}, static_cast<int8_t>(sign));
        test_linear_extreme({13, 5, quick ? 1100 : 6912}, static_cast<int8_t>(sign));
        test_linear_extreme({1, 4, kMostK}, static_cast<int8_t>(sign));
    }
    for (int32_t type : kTypes) {
        for (int64_t K : kK) {
            for (int option = 0; option < 4; ++option) test_quantize({8, 0, K}, type, option & 1, option & 2);
        }
        test_quantize({1, 0, 6912}, type, false, false);
        for (const Group &group : kGroups) {
            if (group.two_levels) continue;
            for (const Shape &s : kWeights) {
                test_weights(s, type, group, false);
                test_weights(s, type, group, true);
            }
            if (group.size < 2) {
                test_weights({0, 65, 203}, type, group, false);
                test_weights({0, 601, 7}, type, group, false);
            }
            for (int32_t dw_type : kTypes) {
                for (const Shape &s : kWeights) test_learned(s, dw_type, type, group, s.N == 5);
                if (group.size < 2) {
                    test_learned({0, 3, quick ? 603 : 1203}, dw_type, type, group, false);
                    test_learned({0, 515, 7}, dw_type, type, group, false);
                }
            }
        }
    }
    for (int64_t count : kScanned) test_invalid(quick && count > 1000 ? 70000 : count);
    test_linears();
    test_groups(quick);
    test_experts(quick);
}

// What is refused, and a comparison that must fail: else nothing above would mean anything.
bool sane() {
    int32_t one = 1, two = 2;
    Isa scratch = {"comparison", 0, 0, 10};
    isa = &scratch;
    expect(&one, &two, kI32, 1, 1);
    return scratch.failures == 11 && bk_cpu_abi_version() == BK_ABI_VERSION &&
           bk_cpu_select_isa("none") == BK_UNAVAILABLE && bk_cpu_last_error()[0] != 0 &&
           bk_cpu_matmul_i8_t2_i32(nullptr, nullptr, nullptr, 1, 1, 0, nullptr, 1) == BK_INVALID_ARGUMENT &&
           bk_cpu_matmul_i8_t2_i32(nullptr, nullptr, nullptr, 0, 1, 1, nullptr, 1) == BK_OK && refuses_groups() &&
           refuses_experts();
}

// Splits bk_cpu_supported_isas().
void list_isas() {
    const char *text = bk_cpu_supported_isas();
    while (*text) {
        size_t length = 0;
        while (text[length] && text[length] != ',') ++length;
        memcpy(isas[isa_count++].name, text, length);
        text += text[length] ? length + 1 : length;
    }
}

Isa *find(const char *name) {
    for (int i = 0; i < isa_count; ++i) {
        if (strcmp(isas[i].name, name) == 0) return &isas[i];
    }
    return nullptr;
}

}  // namespace

int main(int argc, char **argv) {
    list_isas();
    bool passed = sane() && raise_fences();
    if (!passed) printf("FAIL: the library's errors, or this program's comparison or fences\n");
    if (bk_cpu_select_isa("auto") != BK_OK || strcmp(bk_cpu_isa(), isas[0].name) != 0) passed = false;
    printf("instruction sets: %s; in use: %s\n", bk_cpu_supported_isas(), bk_cpu_isa());
    for (int i = 1; i < argc; ++i) {
        if (strcmp(argv[i], "--quick") == 0) {
            quick = true;
            continue;
        }
        const bool without = strcmp(argv[i], "--without") == 0 && i + 1 < argc;
        Isa *named = find(argv[i += without]);
        if (!named) {
            printf("FAIL: %s is not supported here\n", argv[i]);
            passed = false;
        } else if (without) {
            *named = isas[--isa_count];
        }
    }
    passed = passed && isa_count > 0;
    test_all();
    for (int i = 0; i < isa_count; ++i) {
        printf("%s: %lld calls, %lld values, %lld failures\n", isas[i].name, isas[i].calls, isas[i].values,
               isas[i].failures);
        passed = passed && isas[i].failures == 0 && isas[i].calls > 0;
    }
    printf(passed ? "passed\n" : "FAILED\n");
    return passed ? 0 : 1;
}
