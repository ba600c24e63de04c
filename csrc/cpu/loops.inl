// The loops that all instruction sets share. An ISA file opens an anonymous namespace, defines the primitives that
// matmul.inl names, includes this file, and fills its row of the dispatch table with BITLAB_KERNELS.
#include "convert.inl"

#include "activations.inl"
#include "matmul.inl"

#include "groups.inl"

#include "linear.inl"
#include "learned.inl"
#include "pack.inl"
#include "pack_groups.inl"

#define BITLAB_KERNELS(name, supported)                                             \
    {name,         supported,  absmax,      quantize, quantize_planes, kPanelFrom,  \
     kPanelTokens, kGroupSums, interleave,  linear,   linear_i8,       has_invalid, \
     abs_sum,      pack,       pack_groups, unpack,   learned}
