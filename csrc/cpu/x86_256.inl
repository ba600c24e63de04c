// 256-bit vectors of x86. Included inside the anonymous namespace of AVX2 and AVX-VNNI.

constexpr int kWidth = 32;
constexpr int kRows = 8;
using Bytes = __m256i;
using Part = __m256i;
using Sums = __m256i;

inline Bytes load(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
inline void stream(uint8_t *to, const uint8_t (&line)[64]) { __builtin_memcpy(to, line, sizeof(line)); }
inline void stream_end() {}
inline Bytes broadcast(const int8_t *four) {
    int32_t quad;
    __builtin_memcpy(&quad, four, 4);
    return _mm256_set1_epi32(quad);
}
template <typename Vector>
inline void in_order(Vector &vector) {
    asm volatile("" : "+x"(vector));
}
inline U8x16 sixteen(const uint8_t *from, int64_t count) { return copied_16(from, count); }
inline U8x16 permuted(U8x16 bytes, U8x16 by) {
    return reinterpret_cast<U8x16>(_mm_shuffle_epi8(reinterpret_cast<__m128i>(bytes), reinterpret_cast<__m128i>(by)));
}
inline Part zero_part() { return _mm256_setzero_si256(); }
inline Sums zero_sums() { return _mm256_setzero_si256(); }
inline Sums load_sums(const int32_t *from) { return load(from); }
inline void store_sums(int32_t *to, Sums sums) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), sums); }

// out[i] = the sum of the lanes of sums[i].
inline void reduce(const Sums sums[4], int32_t out[4]) {
    const __m256i low = _mm256_hadd_epi32(sums[0], sums[1]);
    const __m256i high = _mm256_hadd_epi32(sums[2], sums[3]);
    const __m256i both = _mm256_hadd_epi32(low, high);
    const __m128i total = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), total);
}
