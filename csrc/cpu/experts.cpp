// One call for all experts of a layer: tokens sorted by expert, codes made once a token, and packed rows shared out
// among the threads by what they cost, whosever they are.
#include <math.h>
#include <string.h>

#include "linear.h"

namespace bitlab {
namespace {

// An expert that got rows: those from `first` on, in the order of the experts.
struct Visit {
    int64_t expert, first, count;
    int8_t *panels;  // of their codes; null where they are few
    int64_t cost;    // of the visits up to this one, as block_cost() counts

    // What a block of packed rows costs, in the time of multiplying it with one token: about as much to read it, twelve
    // times as much to unpack it.
    int64_t block_cost() const { return (panels ? 12 : 1) + count; }
};

// The same in bytes that are worth as much as reading them for one token.
int64_t bytes_of_cost(int64_t cost, int64_t K) { return cost / 2 * kBlock * K; }

// The parts of the workspace, for S = M * choices rows; what is aligned to 64 comes first.
struct Workspace {
    int8_t *codes;        // [S, padded(K)], in the order of the experts
    int8_t *panels;       // of experts with many rows
    int8_t *token_codes;  // [M, padded(K)], where a token has several rows
    Scratch *scratch;     // one a thread; null where no expert can have many rows
    int64_t *rows;        // [S]: the row of y of each
    int64_t *next;        // [E] while they are sorted
    Visit *visits;        // [E]
    float *scale;         // [S]
    float *token_scale;   // [M]
    int32_t *sums;        // [S, columns]
    int32_t *token_sums;  // [M, columns]
    int64_t bytes = 0;

    // memory may be null, to ask for the bytes.
    Workspace(void *memory, int64_t M, int64_t choices, int64_t experts, int64_t K, int64_t columns,
              int64_t num_threads)
        : memory_(static_cast<char *>(memory)) {
        const int64_t S = M * choices, stride = padded(K);
        const int64_t many = S / kLeastPanel < experts ? S / kLeastPanel : experts;
        codes = take<int8_t>(S * stride);
        panels = take<int8_t>(many ? (S + many * (kMostPanelTokens - 1)) * stride : 0);
        token_codes = take<int8_t>(M * stride);
        scratch = take<Scratch>(many ? (num_threads < 1 ? 1 : num_threads) : 0);
        if (!many) scratch = nullptr;
        rows = take<int64_t>(S);
        next = take<int64_t>(experts);
        visits = take<Visit>(experts);
        scale = take<float>(S);
        token_scale = take<float>(M);
        sums = take<int32_t>(S * columns);
        token_sums = take<int32_t>(M * columns);
    }

  private:
    template <typename T>
    T *take(int64_t count) {
        char *const at = memory_ ? memory_ + bytes : nullptr;
        bytes += count * static_cast<int64_t>(sizeof(T));
        return reinterpret_cast<T *>(at);
    }

    char *memory_;
};

// A call, and what its steps leave for the next ones. Each step is for shares of its tasks.
class Experts {
  public:
    Experts(const Kernels &kernels, const bk_experts_args &call, int64_t columns)
        : kernels_(kernels),
          call_(call),
          part_(call.linear.workspace, call.linear.M, call.choices, call.experts, call.linear.K, columns,
                call.linear.num_threads),
          quantize_{call.linear.x,
                    static_cast<int32_t>(call.linear.x_type),
                    call.linear.x_stride,
                    call.linear.M,
                    call.linear.K,
                    padded(call.linear.K),
                    columns,
                    1,
                    call.linear.per_tensor != 0},
          // With one scale for all tokens of an expert, a token's codes differ from expert to expert.
          shares_codes_(call.choices > 1 && call.linear.per_tensor == 0) {
        sort();
    }

    int64_t cost() const { return visits_ ? part_.visits[visits_ - 1].cost : 0; }
    int64_t tokens() const { return call_.linear.M; }
    int64_t places() const { return tokens() * call_.choices; }

    // What does not depend on the expert, of tokens [first, last).
    void quantize(int64_t first, int64_t last) const {
        if (!shares_codes_ && !quantize_.per_tensor) return;
        for (int64_t m = first; m < last; ++m) {
            const float most = absmax_token(kernels_, quantize_, m);
            if (!shares_codes_) {
                part_.token_scale[m] = most;
                continue;
            }
            quantize_token(kernels_, quantize_, most, part_.token_codes + m * quantize_.padded_to,
                           part_.token_scale + m, part_.token_sums + m * quantize_.columns, m);
        }
    }

    // The codes of rows [first, last) in the order of the experts; what no expert gets becomes zeros.
    void arrange(int64_t first, int64_t last) const {
        for (int64_t v = 0; v < visits_; ++v) {
            const Visit &visit = part_.visits[v];
            const int64_t end = visit.first + visit.count < last ? visit.first + visit.count : last;
            if (first >= end) continue;
            const float most = quantize_.per_tensor ? largest(visit) : 0.0f;
            for (; first < end; ++first) arrange_row(visit, first, most);
        }
        const int64_t bytes = call_.linear.N * size_of(static_cast<int32_t>(call_.linear.y_type));
        for (; first < last; ++first) {
            memset(static_cast<char *>(call_.linear.y) + part_.rows[first] * bytes, 0, static_cast<size_t>(bytes));
        }
    }

    // The blocks of packed rows whose cost is from `first` on and before `last`.
    void multiply(int64_t first, int64_t last, int64_t thread) const {
        int64_t before = 0;
        for (int64_t v = 0; v < visits_ && before < last; ++v) {
            const Visit &visit = part_.visits[v];
            const int64_t unit = visit.block_cost();
            const int64_t begin = first <= before ? 0 : (first - before + unit - 1) / unit;
            const int64_t end = last >= visit.cost ? blocks(call_.linear.N) : (last - before + unit - 1) / unit;
            if (begin < end) linear_blocks(kernels_, arguments(visit), part_.scratch, begin, end, thread);
            before = visit.cost;
        }
    }

  private:
    bool is_expert(int64_t index) const { return index >= 0 && index < call_.experts; }

    void sort() {
        const int64_t E = call_.experts, S = places();
        for (int64_t e = 0; e < E; ++e) part_.next[e] = 0;
        for (int64_t s = 0; s < S; ++s) {
            if (is_expert(call_.index[s])) ++part_.next[call_.index[s]];
        }
        int64_t first = 0, cost = 0;
        int8_t *panels = part_.panels;
        for (int64_t e = 0; e < E; ++e) {
            const int64_t count = part_.next[e];
            part_.next[e] = first;
            if (count == 0) continue;
            const bool many = count >= kernels_.panel_from;
            Visit &visit = part_.visits[visits_++];
            visit = {e, first, count, many ? panels : nullptr, 0};
            visit.cost = cost += blocks(call_.linear.N) * visit.block_cost();
            const int64_t unit = kernels_.panel_tokens;
            if (many) panels += (count + unit - 1) / unit * unit * padded(call_.linear.K);
            first += count;
        }
        for (int64_t s = 0; s < S; ++s) {
            part_.rows[is_expert(call_.index[s]) ? part_.next[call_.index[s]]++ : first++] = s;
        }
    }

    // max|x| over the tokens of an expert.
    float largest(const Visit &visit) const {
        float most = 0.0f;
        for (int64_t j = visit.first; j < visit.first + visit.count && isfinite(most); ++j) {
            most = larger(most, part_.token_scale[part_.rows[j] / call_.choices]);
        }
        return most;
    }

    void arrange_row(const Visit &visit, int64_t j, float most) const {
        const int64_t m = part_.rows[j] / call_.choices, columns = quantize_.columns, stride = quantize_.padded_to;
        int8_t *codes = part_.codes + j * stride;
        const int8_t *made = codes;
        if (shares_codes_) {
            made = part_.token_codes + m * stride;
            part_.scale[j] = part_.token_scale[m];
            memcpy(part_.sums + j * columns, part_.token_sums + m * columns, static_cast<size_t>(4 * columns));
            if (!visit.panels) memcpy(codes, made, static_cast<size_t>(stride));
        } else {
            const float own = quantize_.per_tensor ? most : absmax_token(kernels_, quantize_, m);
            quantize_token(kernels_, quantize_, own, codes, part_.scale + j, part_.sums + j * columns, m);
        }
        if (!visit.panels) return;
        const int64_t place = j - visit.first, unit = kernels_.panel_tokens;
        kernels_.interleave(made, stride, 1, visit.panels + place / unit * unit * stride + place % unit * 4);
    }

    LinearArgs arguments(const Visit &visit) const {
        const int64_t N = call_.linear.N, K = call_.linear.K, e = visit.expert, columns = quantize_.columns;
        bk_linear_args one = call_.linear;
        one.M = visit.count;
        one.qweight = static_cast<const uint8_t *>(one.qweight) + e * ((N + 3) / 4) * K;
        one.weight_scale += e * one.scale_rows * (one.multiplier ? 1 : groups(one.scale_columns));
        if (one.multiplier) one.multiplier += e * N * one.scale_columns;
        if (one.bias) {
            const int64_t bytes = N * size_of(static_cast<int32_t>(one.bias_type));
            one.bias = static_cast<const char *>(one.bias) + e * bytes;
        }
        LinearArgs args = linear_args(one, {part_.codes + visit.first * quantize_.padded_to, visit.panels,
                                            part_.scale + visit.first, part_.sums + visit.first * columns, columns, 1});
        args.rows = part_.rows + visit.first;
        return args;
    }

    const Kernels &kernels_;
    const bk_experts_args &call_;
    const Workspace part_;
    const QuantizeArgs quantize_;
    const bool shares_codes_;
    int64_t visits_ = 0;
};

const char *check_experts(const bk_experts_args &call) {
    const bk_linear_args &linear = call.linear;
    if (call.experts < 1 || call.choices < 1) return "experts and choices must be at least 1";
    const int64_t columns = linear.scale_columns;
    if (const char *text = check_shape(linear.M, linear.N, linear.K, linear.scale_rows, columns, kPadK)) return text;
    if (const char *text = check_multiplier(linear.multiplier, linear.N, linear.K, linear.scale_rows, columns)) {
        return text;
    }
    return valid_types(linear) ? nullptr : kWrongTypes;
}

}  // namespace
}  // namespace bitlab

using namespace bitlab;

extern "C" {

int64_t bk_cpu_experts_workspace(int64_t M, int64_t choices, int64_t experts, int64_t K, int64_t scale_columns,
                                 int32_t num_threads) {
    return Workspace(nullptr, M, choices, experts, K, groups(scale_columns), num_threads).bytes;
}

int32_t bk_cpu_experts_i8_t2(const bk_experts_args *call) {
    const bk_linear_args &linear = call->linear;
    if (const char *text = check_experts(*call)) return fail(BK_INVALID_ARGUMENT, text);
    if (linear.M == 0) return BK_OK;
    const Kernels &kernels = selected_kernels();
    const int64_t K = linear.K;
    const int64_t columns = linear.multiplier && !kernels.group_sums ? 1 : groups(linear.scale_columns);
    const Experts experts(kernels, *call, columns);
    const int64_t cost = experts.cost(), tokens = experts.tokens(), places = experts.places();
    const int threads =
        threads_for(bytes_of_cost(cost, K), kBytesPerThread, cost, static_cast<int32_t>(linear.num_threads));
    // A few tokens are quantized by the caller: the others would wait for it in any case.
    const bool alone = threads == 1 || places * K < kElementsPerThread;
    if (alone) {
        experts.quantize(0, tokens);
        experts.arrange(0, places);
    }
    if (threads == 1) {
        experts.multiply(0, cost, 0);
        return BK_OK;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t count = omp_get_num_threads();
        const int64_t me = omp_get_thread_num();
        if (!alone) {
            experts.quantize(tokens * me / count, tokens * (me + 1) / count);
#pragma omp barrier
            experts.arrange(places * me / count, places * (me + 1) / count);
#pragma omp barrier
        }
        experts.multiply(cost * me / count, cost * (me + 1) / count, me);
    }
    return BK_OK;
}

}  // extern "C"
