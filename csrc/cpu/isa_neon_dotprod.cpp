// NEON with dotprod: sdot is signed, so the last lane is shifted down; the others are at most 2 * 16.
#include <arm_neon.h>
#include <sys/auxv.h>

#include "bitkernels.h"
#include "isa.h"

namespace bitlab {
namespace {

#include "neon.inl"

constexpr int kLaneShift[4] = {0, 2, 4, 0};

template <int L>
inline void split(Bytes w, int lane, Bytes lanes[L]) {
    for (int i = 0; i < L; ++i) {
        const Bytes mask = vdupq_n_u8(static_cast<uint8_t>(3 << (2 * (lane + i))));
        lanes[i] = lane + i == 3 ? vshrq_n_u8(w, 6) : vandq_u8(w, mask);
    }
}
inline Part multiply_add(Part part, Bytes w, Bytes code) {
    return vdotq_s32(part, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(code));
}

#include "loops.inl"

bool supported() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

}  // namespace

extern const Kernels kKernelsNeonDotprod = BITLAB_KERNELS("neon_dotprod", supported);

}  // namespace bitlab
