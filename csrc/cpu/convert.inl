// Float types: loads to float32 (exact) and stores from float32 (one rounding, half to even).
// Included by each ISA file inside its anonymous namespace, so that no helper compiled with wider instructions can be
// picked by the linker for the baseline path.

inline float bits_to_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

struct F32 {
    using Storage = float;
    using Bits = uint32_t;
    static constexpr Bits kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000;
    static float from_bits(Bits bits) { return bits_to_float(bits); }
    static Bits to_bits(float value) { return float_to_bits(value); }
    static float load(float value) { return value; }
    static float store(float value) { return value; }
};

struct Bf16 {
    using Storage = uint16_t;
    using Bits = uint16_t;
    static constexpr Bits kMagnitude = 0x7FFF, kInfinity = 0x7F80;
    static float from_bits(Bits bits) { return load(bits); }
    static Bits to_bits(float value) { return store(value); }
    static float load(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }
    static uint16_t store(float value) {
        const uint32_t bits = float_to_bits(value);
        if (value != value) return 0x7FC0;
        return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
};

struct F16 {
    using Storage = uint16_t;
    using Bits = uint16_t;
    static constexpr Bits kMagnitude = 0x7FFF, kInfinity = 0x7C00;
    static float from_bits(Bits bits) { return load(bits); }
    static Bits to_bits(float value) { return store(value); }
    static float load(uint16_t value) {
        const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
        const uint32_t magnitude = static_cast<uint32_t>(value & 0x7FFF) << 13;
        // An exponent of all ones stays one; a subnormal's is rebuilt by taking its leading 2^-14 off again.
        const uint32_t rebased = magnitude + (magnitude < 0x0F800000 ? 0x38000000 : 0x70000000);
        const float subnormal = bits_to_float(magnitude + 0x38800000) - 0x1p-14f;
        const float normal = bits_to_float(rebased);
        return bits_to_float(sign | float_to_bits(magnitude < 0x00800000 ? subnormal : normal));
    }
    static uint16_t store(float value) {
        const uint32_t bits = float_to_bits(value);
        const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
        const uint32_t magnitude = bits & 0x7FFFFFFF;
        if (magnitude > 0x7F800000) return sign | 0x7E00;
        if (magnitude >= 0x47800000) return sign | 0x7C00;
        if (magnitude < 0x38800000) {
            // Subnormal: adding 0.5 aligns the last kept bit with float32's last bit and rounds half to even.
            return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000));
        }
        const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
        return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
    }
};

// Calls f with the type's tag.
template <typename F>
inline auto with_type(int32_t type, F &&f) {
    if (type == BK_BF16) return f(Bf16{});
    if (type == BK_F16) return f(F16{});
    return f(F32{});
}

// Sums that may leave int32 on their way.
inline void add_wrapping(int32_t &sum, int32_t value) {
    sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(value));
}

// An integer known at compile time, as an argument.
template <int N>
struct Constant {
    static constexpr int value = N;
};
