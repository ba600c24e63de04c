// All experts of a layer in one call: each expert's rows are what a linear call of its tokens gives.
#ifndef BITLAB_TESTS_EXPERT_CHECKS_H
#define BITLAB_TESTS_EXPERT_CHECKS_H

#include "linear_checks.h"

namespace harness {

// Who gets which tokens: drawn, none among them; all to one expert; all to none; more and more to the later ones; all
// alike, so that the threads' shares end where an expert does.
enum Spread { kDrawn, kOne, kNone, kRising, kEven };

inline int64_t choose(Spread spread, int64_t experts, int64_t s, int64_t rows) {
    if (spread == kEven) return s % experts;
    if (spread == kOne) return experts - 1;
    if (spread == kNone) return s % 2 ? experts : -1;
    if (spread == kRising) return experts - 1 - (rows - 1 - s) * (rows - 1 - s) * experts / (rows * rows);
    return static_cast<int64_t>(random_bits() % static_cast<uint32_t>(experts + 2)) - 1;
}

// Everything that a call takes, and its output.
struct Experts {
    Shape s;
    int64_t choices, experts, stride;
    Options o;
    void *x;
    int64_t *index;
    int8_t *w;
    uint8_t *qweight, *multiplier;
    float *scales;
    void *bias;
    unsigned char *y;
    void *work;

    Experts(const Shape &shape, int64_t choices, int64_t experts, Spread spread, const Options &options)
        : s(shape), choices(choices), experts(experts), stride(shape.K + 3), o(options) {
        x = tokens(o.x_type, stride, s.M, s.K);
        fill_tokens(x, o.x_type, stride, s.M, s.K, true);
        index = input<int64_t>(rows());
        for (int64_t i = 0; i < rows(); ++i) index[i] = choose(spread, experts, i, rows());
        w = array<int8_t>(experts * s.N * s.K);
        fill_ternary(w, experts * s.N * s.K);
        qweight = input<uint8_t>(experts * packed_size());
        for (int64_t e = 0; e < experts; ++e) {
            reference::pack(w + e * s.N * s.K, qweight + e * packed_size(), s.N, s.K, 2);
        }
        scales = input<float>(experts * o.group.scales(s.N, s.K));
        fill_scales(scales, experts * o.group.scales(s.N, s.K));
        const int64_t columns = o.group.columns(s.K);
        multiplier = o.group.two_levels ? fill_multipliers(experts * s.N * columns) : nullptr;
        bias = o.bias_type < 0 ? nullptr : elements(o.bias_type, experts * s.N);
        if (bias) fill_floats(bias, o.bias_type, experts * s.N, 4);
        y = output(rows() * s.N * size_of(o.y_type), size_of(o.y_type));
        work = output(bk_cpu_experts_workspace(s.M, choices, experts, s.K, columns, kMostThreads), 0);
    }
    int64_t rows() const { return s.M * choices; }
    int64_t packed_size() const { return (s.N + 3) / 4 * s.K; }

    int32_t call() const {
        const int32_t type = o.bias_type < 0 ? BK_F32 : o.bias_type;
        const bk_experts_args args = {{qweight, scales, o.group.rows(s.N), o.group.columns(s.K), multiplier, bias, type,
                                       s.N, s.K, o.per_tensor, x, o.x_type, stride, y, o.y_type, s.M, work, threads},
                                      index,
                                      choices,
                                      experts};
        return bk_cpu_experts_i8_t2(&args);
    }

    // What the rows of one expert have to be, written to their places in `want`.
    void compute(int64_t e, unsigned char *want, void *own_x, int8_t *codes, float *x_scale,
                 unsigned char *own_y) const {
        int64_t count = 0;
        for (int64_t i = 0; i < rows(); ++i) {
            if (index[i] != e) continue;
            for (int64_t k = 0; k < s.K; ++k) {
                const float value = reference::load(x, o.x_type, i / choices * stride + k);
                reference::store(own_x, o.x_type, count * s.K + k, value);
            }
            ++count;
        }
        if (count == 0) return;
        const int64_t columns = o.group.columns(s.K), row = s.N * size_of(o.y_type);
        const Scales own = {scales + e * o.group.scales(s.N, s.K), o.group.rows(s.N), columns,
                            multiplier ? multiplier + e * s.N * columns : nullptr};
        Bias terms = {nullptr, BK_F32};
        if (bias) terms = {static_cast<unsigned char *>(bias) + e * s.N * size_of(o.bias_type), o.bias_type};
        reference::quantize(own_x, o.x_type, s.K, codes, x_scale, count, s.K, o.per_tensor);
        reference::linear_i8(codes, x_scale, w + e * s.N * s.K, own, terms, own_y, o.y_type, count, s.N, s.K);
        for (int64_t i = 0, at = 0; i < rows(); ++i) {
            if (index[i] == e) memcpy(want + i * row, own_y + at++ * row, static_cast<size_t>(row));
        }
    }
};

inline void check_experts(const Shape &s, int64_t choices, int64_t experts, Spread spread, const Options &o) {
    begin(
        "experts %lld of %lld, spread %d, M %lld N %lld K %lld, types %d %d %d, group %lld, two_levels %d, per_tensor "
        "%d",
        number(choices), number(experts), spread, number(s.M), number(s.N), number(s.K), o.x_type, o.y_type,
        o.bias_type, number(o.group.size), o.group.two_levels, o.per_tensor);
    const Experts call(s, choices, experts, spread, o);
    const int64_t rows = call.rows(), size = rows * s.N * size_of(o.y_type);
    auto *want = array<unsigned char>(size);
    auto *own_y = array<unsigned char>(size);
    void *own_x = array<unsigned char>(rows * s.K * size_of(o.x_type));
    auto *codes = array<int8_t>(rows * s.K);
    auto *x_scale = array<float>(rows);
    memset(want, 0, static_cast<size_t>(size));
    for (int64_t e = 0; e < experts; ++e) call.compute(e, want, own_x, codes, x_scale, own_y);
    on_every_isa([&] { return call.call(); }, [&] { expect(call.y, want, o.y_type, rows, s.N); });
}

inline void test_experts(bool quick) {
    constexpr Group kEvery[] = {{0, false}, {1, false}, {64, false}, {128, false}, {64, true}, {128, true}};
    constexpr Spread kSpreads[] = {kDrawn, kOne, kRising, kNone};
    constexpr int32_t kTypes[] = {BK_F32, BK_BF16, BK_F16};
    // Experts with few tokens, with more than a tile, and both; more experts than rows.
    constexpr int64_t kCalls[][3] = {{1, 1, 1},  {1, 8, 16}, {2, 3, 300}, {7, 2, 5},
                                     {40, 1, 2}, {30, 4, 3}, {25, 3, 7},  {100, 2, 4}};
    constexpr int64_t kN[] = {1, 5, 64, 67, 130};
    constexpr int64_t kK[] = {64, 128, 320, 640, 65, 31};
    unsigned turn = 0;
    for (const auto &[M, choices, experts] : kCalls) {
        for (const Group &group : kEvery) {
            for (int i = 0; i < 3; ++i) {
                ++turn;
                if (quick && turn % 4 != 0) continue;
                const int64_t K = experts > 100 ? 128 : kK[turn % (group.size > 1 ? 4 : 6)];
                if (group.size > 1 && K % group.size != 0) continue;
                const int64_t N = experts > 100 ? kN[turn % 2] : kN[turn * 2 % 5];
                const Options o = {kTypes[turn % 3],
                                   kTypes[turn / 3 % 3],
                                   static_cast<int32_t>(turn % 4) - 1,
                                   group,
                                   turn % 5 == 0,
                                   false};
                check_experts({M, N, K}, choices, experts, kSpreads[turn % 7 % 4], o);
            }
        }
    }
    check_experts({8, 130, 640}, 1, 4, kEven, {BK_F32, BK_F32, -1, {1, false}, false, false});
    // Shares of the quantization, too, are worth a second thread.
    check_experts({33, 20, 640}, 3, 5, kDrawn, {BK_F32, BK_F32, BK_F32, {1, false}, false, false});
    check_experts({60, 20, 640}, 1, 3, kRising, {BK_BF16, BK_F32, -1, {64, true}, true, false});
}

inline bool refuses_experts() {
    begin("refused");
    const Experts call({2, 4, 64}, 2, 3, kDrawn, {BK_F32, BK_F32, BK_F32, {1, false}, false, false});
    bk_experts_args args = {{call.qweight, call.scales, 4, 0, nullptr, call.bias, BK_F32, 4, 64, 0, call.x, BK_F32, 67,
                             call.y, BK_F32, 2, call.work, 1},
                            call.index,
                            2,
                            3};
    const auto status = [&](int64_t &field, int64_t value) {
        const int64_t before = field;
        field = value;
        const int32_t got = bk_cpu_experts_i8_t2(&args);
        field = before;
        return got;
    };
    return status(args.choices, 0) == BK_INVALID_ARGUMENT && status(args.experts, 0) == BK_INVALID_ARGUMENT &&
           status(args.linear.M, -1) == BK_INVALID_ARGUMENT && status(args.linear.M, 0) == BK_OK &&
           status(args.linear.scale_rows, 2) == BK_INVALID_ARGUMENT &&
           status(args.linear.scale_columns, 3) == BK_INVALID_ARGUMENT &&
           status(args.linear.x_type, 3) == BK_INVALID_ARGUMENT;
}

}  // namespace harness

#endif
