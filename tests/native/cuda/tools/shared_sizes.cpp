// Prints the dynamic shared memory of each kernel: the beginning of its name, then bytes.
#include <stdio.h>

#include "experts.cuh"
#include "fused.cuh"
#include "gemv.cuh"
#include "gradient.cuh"
#include "route.cuh"
#include "run.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

using namespace bitlab;

namespace {

template <typename Math, int kTiles>
void many(const char *math) {
    using Layout = ManyLayout<Math, kTiles>;
    printf("many_kernel<bitlab::%s, %d,\t%u\n", math, kTiles, Layout::kStages * Layout::kStageBytes);
}

template <typename Math, int kTiles>
void few(const char *math) {
    printf("few_kernel<bitlab::%s, %d,\t%u\n", math, kTiles, few_shared_bytes<Math, kTiles>());
}

template <typename Math>
void experts(const char *math) {
    printf("experts_few_kernel<bitlab::%s, 1,\t%u\n", math, few_shared_bytes<Math, 1>());
    printf("experts_few_kernel<bitlab::%s, 2,\t%u\n", math, few_shared_bytes<Math, 2>());
    printf("experts_many_kernel<bitlab::%s, 2,\t%u\n", math,
           ManyLayout<Math, 2>::kStages * ManyLayout<Math, 2>::kStageBytes);
    printf("experts_many_kernel<bitlab::%s, 4,\t%u\n", math,
           ManyLayout<Math, 4>::kStages * ManyLayout<Math, 4>::kStageBytes);
}

template <int kGroups, bool kMultiplied>
void wgmma(const char *arguments) {
    printf("wgmma_kernel<%s>\t%u\n", arguments, WgmmaLayout<kGroups, kMultiplied>::kBytes);
}

// At 8192 columns.
void fused(const char *math, bool multiplied) {
    for (int tiles = 1; tiles <= 2; ++tiles) {
        printf("fused_kernel<bitlab::%s, %d>\t%lld\n", math, tiles,
               static_cast<long long>(fused_shared_bytes(tiles, multiplied, 8192)));
    }
}

}  // namespace

int main() {
    few<TernaryInt8, 1>("TernaryInt8");
    few<TernaryInt8, 2>("TernaryInt8");
    few<Int8Int8, 1>("Int8Int8");
    few<Int8Int8, 2>("Int8Int8");
    few<TernaryInt8Multiplied, 1>("TernaryInt8Multiplied");
    few<TernaryInt8Multiplied, 2>("TernaryInt8Multiplied");
    few<TernaryBf16<false>, 2>("TernaryFloat<true, 1, false>");
    few<TernaryF16<false>, 2>("TernaryFloat<false, 1, false>");
    few<TernaryF32<false>, 2>("TernaryFloat<true, 3, false>");
    few<TernaryBf16<true>, 2>("TernaryFloat<true, 1, true>");
    few<TernaryF16<true>, 2>("TernaryFloat<false, 1, true>");
    few<TernaryF32<true>, 2>("TernaryFloat<true, 3, true>");
    fused("TernaryInt8", false);
    fused("TernaryInt8Multiplied", true);
    many<TernaryInt8, 2>("TernaryInt8");
    many<TernaryInt8, 8>("TernaryInt8");
    many<Int8Int8, 8>("Int8Int8");
    many<TernaryInt8Multiplied, 2>("TernaryInt8Multiplied");
    many<TernaryInt8Multiplied, 8>("TernaryInt8Multiplied");
    many<TernaryBf16<false>, 2>("TernaryFloat<true, 1, false>");
    many<TernaryBf16<false>, 4>("TernaryFloat<true, 1, false>");
    many<TernaryF16<false>, 2>("TernaryFloat<false, 1, false>");
    many<TernaryF16<false>, 4>("TernaryFloat<false, 1, false>");
    many<TernaryF32<false>, 2>("TernaryFloat<true, 3, false>");
    many<TernaryBf16<true>, 4>("TernaryFloat<true, 1, true>");
    many<TernaryF16<true>, 4>("TernaryFloat<false, 1, true>");
    many<TernaryF32<true>, 2>("TernaryFloat<true, 3, true>");
    experts<TernaryInt8>("TernaryInt8");
    experts<TernaryInt8Multiplied>("TernaryInt8Multiplied");
    printf("experts_quantize_kernel\t%u\n", kSharedBytes);
    printf("experts_wgmma_kernel<false>\t%u\n", WgmmaLayout<1, false>::kBytes);
    printf("experts_wgmma_kernel<true>\t%u\n", WgmmaLayout<1, true>::kBytes);
    wgmma<1, false>("1, false");
    wgmma<2, false>("2, false");
    wgmma<1, true>("1, true");
    wgmma<2, true>("2, true");
    printf("gradient_kernel<true, 1\t%u\n", gradient_shared_bytes<1>());
    printf("gradient_kernel<false, 1\t%u\n", gradient_shared_bytes<1>());
    printf("gradient_kernel<true, 3\t%u\n", gradient_shared_bytes<3>());
    printf("gemv_kernel<(bitlab::GemvGroups)1>\t%u\n", kSharedBytes);
    printf("gemv_kernel\t%u\n", gemv_shared_bytes(kGemvMaxK));
    printf("pack_groups_kernel\t%u\n", pack_groups_shared_bytes(BK_CUDA_MAX_IN_FEATURES / 64));
    printf("quantize_kernel\t%u\n", quantize_shared_bytes(BK_CUDA_MAX_IN_FEATURES));
    printf("absmax_kernel\t%u\n", 128);
    printf("sum_rows_kernel\t%u\n", 8 * kWeightThreads);
    printf("learned_rows_kernel\t%u\n", 8 * kWeightThreads);
}
