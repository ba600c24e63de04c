// How the products of all experts of a layer are cut into tiles: the host side of route.cuh and experts.cuh.
#ifndef BITLAB_CUDA_EXPERTS_H
#define BITLAB_CUDA_EXPERTS_H

#include "matmul.h"

namespace bitlab {

struct ExpertsParams;

struct ExpertsPlan {
    bool grouped;                 // a float32 scale for each group
    bool multiplied;              // an integer multiplier for each group, and one scale for each output
    int few;                      // kTiles of few_tile, of eight tokens each
    int many;                     // kTiles of many_tile, of sixteen tokens each; 0: all experts have tiles of few
    bool wgmma;                   // wgmma_tile of 64 tokens instead of many_tile
    int64_t most_few, most_many;  // tiles of tokens that there may be, wherever the tokens go
};

// The lists of tiles of tokens that the kernels take.
struct ExpertsTiles {
    const void *few, *many;
};

// How this many rows of y are computed, with wgmma where it pays if the device, the codes and the weights' rows allow
// it; a function of the arguments alone.
ExpertsPlan plan_experts(int64_t rows, int64_t experts, Groups groups, bool wgmma);

// Queue the products, one for each kind of arithmetic in a file of its own (they take long to compile).
const char *run_experts_int8(const ExpertsPlan &plan, const ExpertsParams &params, const ExpertsTiles &tiles,
                             void *stream);
const char *run_experts_multiplied(const ExpertsPlan &plan, const ExpertsParams &params, const ExpertsTiles &tiles,
                                   void *stream);

// Queues experts_wgmma_kernel, which only some architectures have; x is in the order of place_of_column.
const char *run_experts_wgmma(const ExpertsPlan &plan, const ExpertsParams &params, const ExpertsTiles &tiles,
                              void *stream);

}  // namespace bitlab

#endif
