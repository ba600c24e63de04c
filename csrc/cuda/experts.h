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
    int64_t most_few, most_many;  // tiles of tokens that there may be, wherever the tokens go
};

// The lists of tiles of tokens that the kernels take.
struct ExpertsTiles {
    const void *few, *many;
};

// How this many rows of y are computed; a function of the sizes alone.
ExpertsPlan plan_experts(int64_t rows, int64_t experts, Groups groups);

// Queue the products, one for each kind of arithmetic in a file of its own (they take long to compile).
const char *run_experts_int8(const ExpertsPlan &plan, const ExpertsParams &params, const ExpertsTiles &tiles,
                             void *stream);
const char *run_experts_multiplied(const ExpertsPlan &plan, const ExpertsParams &params, const ExpertsTiles &tiles,
                                   void *stream);

}  // namespace bitlab

#endif
