// Gradients of learned scales. Included by each ISA file inside its anonymous namespace.

// Elements whose float32 copies and terms are held at once: they stay in the L1 cache. A multiple of 16.
constexpr int64_t kLearnedPart = 512;

// Elements as float32: where they are, or widened in `to`.
inline const float *widened(const void *from, int32_t type, int64_t offset, int64_t count, float *to) {
    return with_type(type, [=](auto tag) -> const float * {
        using T = decltype(tag);
        const auto *own = static_cast<const typename T::Storage *>(from) + offset;
        if constexpr (sizeof(*own) == 4) {
            return own;
        } else {
            for (int64_t k = 0; k < count; ++k) to[k] = T::load(own[k]);
            return to;
        }
    });
}

inline void narrow(const float *from, int64_t count, void *to, int32_t type, int64_t offset) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        auto *own = static_cast<typename T::Storage *>(to) + offset;
        for (int64_t k = 0; k < count; ++k) own[k] = T::store(from[k]);
    });
}

// Loops of one thing each, over arrays: as such GCC 12 turns them into vectors.
double learned(const LearnedArgs &args, int64_t offset, int64_t count, float step) {
    alignas(64) float widened_dw[kLearnedPart], widened_weight[kLearnedPart], kept[kLearnedPart], terms[kLearnedPart];
    const float inverse = 1.0f / step;
    double lanes[16] = {};
    for (int64_t first = 0; first < count; first += kLearnedPart) {
        const int64_t size = count - first < kLearnedPart ? count - first : kLearnedPart;
        const float *dw = widened(args.dw, args.dw_type, offset + first, size, widened_dw);
        const float *weight = widened(args.weight, args.weight_type, offset + first, size, widened_weight);
        for (int64_t k = 0; k < size; ++k) {
            const float ratio = weight[k] * inverse;
            const float code = ratio > 0.5f ? 1.0f : ratio < -0.5f ? -1.0f : 0.0f;
            // NaN is on neither side: it passes no gradient, and makes that of the step NaN.
            kept[k] = __builtin_fabsf(ratio) < 1.5f ? dw[k] : 0.0f;
            terms[k] = (__builtin_fabsf(ratio) >= 1.5f ? code : code - ratio) * dw[k];
        }
        narrow(kept, size, args.gradient, args.weight_type, offset + first);
        const int64_t whole = size / 16 * 16;
        for (int64_t k = 0; k < whole; k += 16) {
            for (int l = 0; l < 16; ++l) lanes[l] += static_cast<double>(terms[k + l]);
        }
        for (int64_t k = whole; k < size; ++k) lanes[k - whole] += static_cast<double>(terms[k]);
    }
    double sum = lanes[0];
    for (int l = 1; l < 16; ++l) sum += lanes[l];
    return sum;
}
