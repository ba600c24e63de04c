// Prints the dynamic shared memory of each kernel: the beginning of its name, then bytes.
#include <stdio.h>

#include "gemv.cuh"
#include "gradient.cuh"
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

}  // namespace

int main() {
    few<TernaryInt8, 1>("TernaryInt8");
    few<TernaryInt8, 2>("TernaryInt8");
    few<Int8Int8, 1>("Int8Int8");
    few<Int8Int8, 2>("Int8Int8");
    few<TernaryBf16, 2>("TernaryFloat<true, 1>");
    few<TernaryF16, 2>("TernaryFloat<false, 1>");
    few<TernaryF32, 2>("TernaryFloat<true, 3>");
    many<TernaryInt8, 2>("TernaryInt8");
    many<TernaryInt8, 8>("TernaryInt8");
    many<Int8Int8, 8>("Int8Int8");
    many<TernaryBf16, 2>("TernaryFloat<true, 1>");
    many<TernaryBf16, 4>("TernaryFloat<true, 1>");
    many<TernaryF16, 2>("TernaryFloat<false, 1>");
    many<TernaryF16, 4>("TernaryFloat<false, 1>");
    many<TernaryF32, 2>("TernaryFloat<true, 3>");
    printf("wgmma_kernel<1>\t%u\n", WgmmaLayout<1>::kBytes);
    printf("wgmma_kernel<2>\t%u\n", WgmmaLayout<2>::kBytes);
    printf("gradient_kernel<true, 1>\t%u\n", gradient_shared_bytes<1>());
    printf("gradient_kernel<false, 1>\t%u\n", gradient_shared_bytes<1>());
    printf("gradient_kernel<true, 3>\t%u\n", gradient_shared_bytes<3>());
    printf("gemv_kernel<false>\t%u\n", gemv_shared_bytes(kGemvMaxK));
    printf("gemv_kernel<true>\t%u\n", kSharedBytes);
    printf("quantize_kernel\t%u\n", quantize_shared_bytes(BK_CUDA_MAX_IN_FEATURES));
    printf("absmax_kernel\t%u\n", 128);
    printf("sum_rows_kernel\t%u\n", 8 * kWeightThreads);
}
