// NEON with i8mm: usdot takes unsigned weights, so every lane is taken as it stands.
#include <arm_neon.h>
#include <sys/auxv.h>

#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

#include "neon.inl"

constexpr int kLaneShift[4] = {0, 2, 4, 6};

template <int L>
inline void split(Bytes w, int lane, Bytes lanes[L]) {
    for (int i = 0; i < L; ++i) lanes[i] = vandq_u8(w, vdupq_n_u8(static_cast<uint8_t>(3 << (2 * (lane + i)))));
}
inline Part multiply_add(Part part, Bytes w, Bytes code) { return vusdotq_s32(part, w, vreinterpretq_s8_u8(code)); }

#include "loops.inl"

bool supported() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }

}  // namespace

extern const Kernels kKernelsNeonI8mm = BITLAB_KERNELS("neon_i8mm", supported);

}  // namespace bitlab
