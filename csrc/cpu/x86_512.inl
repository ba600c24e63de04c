// 512-bit vectors of x86. Included inside the anonymous namespace of the AVX-512 files.

constexpr int kWidth = 64;
constexpr int kRows = 16;
using Bytes = __m512i;
using Part = __m512i;
using Sums = __m512i;

inline Bytes load(const void *from) { return _mm512_loadu_si512(from); }
inline void stream(uint8_t *to, const uint8_t (&line)[64]) {
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to), load(line));
    } else {
        _mm512_storeu_si512(to, load(line));
    }
}
inline void stream_end() { _mm_sfence(); }
inline Bytes broadcast(const int8_t *four) {
    int32_t quad;
    __builtin_memcpy(&quad, four, 4);
    return _mm512_set1_epi32(quad);
}
template <typename Vector>
inline void in_order(Vector &vector) {
    asm volatile("" : "+v"(vector));
}
inline U8x16 sixteen(const uint8_t *from, int64_t count) {
    const auto there = static_cast<__mmask64>(count < 16 ? (1u << count) - 1 : 0xFFFFu);
    return reinterpret_cast<U8x16>(_mm512_castsi512_si128(_mm512_maskz_loadu_epi8(there, from)));
}
inline U8x16 permuted(U8x16 bytes, U8x16 by) {
    return reinterpret_cast<U8x16>(_mm_shuffle_epi8(reinterpret_cast<__m128i>(bytes), reinterpret_cast<__m128i>(by)));
}
inline Part zero_part() { return _mm512_setzero_si512(); }
inline Sums zero_sums() { return _mm512_setzero_si512(); }
inline Sums load_sums(const int32_t *from) { return load(from); }
inline void store_sums(int32_t *to, Sums sums) { _mm512_storeu_si512(to, sums); }

inline __m256i halves(Sums sums) {
    return _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
}

// out[i] = the sum of the lanes of sums[i].
inline void reduce(const Sums sums[4], int32_t out[4]) {
    const __m256i low = _mm256_hadd_epi32(halves(sums[0]), halves(sums[1]));
    const __m256i high = _mm256_hadd_epi32(halves(sums[2]), halves(sums[3]));
    const __m256i both = _mm256_hadd_epi32(low, high);
    const __m128i total = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), total);
}
