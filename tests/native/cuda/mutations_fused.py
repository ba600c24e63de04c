"""The faults of few tokens in one launch of clusters: what is replaced in which file."""

from __future__ import annotations

from dataclasses import replace

from tests.native.cuda.mutation import BARRIER, Mutation, faults_in


def noticed_by_fused(faults: list[Mutation]) -> list[Mutation]:
    """Faults of what decides, which only calls of the fused kernel notice."""
    return [replace(fault, calls="fused") for fault in faults]


FUSED = [
    *faults_in(
        "csrc/cuda/fused.cuh",
        "fused",
        ("earlier kernels not waited for", "wait_for_previous();", ""),
        ("blocks that may not have begun", "cluster_wait();  // all blocks have begun", ""),
        ("x not waited for", "wait_async<kFusedDepth>();", "wait_async<kFusedDepth + 1>();"),
        ("packed bytes not waited for", "wait_async<kFusedDepth - 1>();", "wait_async<kFusedDepth>();"),
        ("codes written over x that is read", "sync_warp();", ""),
        ("missing barrier after the codes", f"quantize_share<Layout>(q, own, tokens); {BARRIER}", "quantize_share<Layout>(q, own, tokens);"),
        ("maxima not waited for", "wait_inbox(Layout::kMostInbox, 0);", ""),
        ("sums not waited for", "wait_inbox(Layout::kSumsInbox, step);", ""),
        ("the first round's sums for all", "wait_inbox(Layout::kSumsInbox, step);", "wait_inbox(Layout::kSumsInbox, 0);"),
        ("sums of codes not expected", "word_bytes + sums_bytes", "sums_bytes"),
        ("the second round not expected", "if (thread == 0 && more) expect", "if (thread == 0 && false) expect"),
        ("every round expected by several", "if (thread == 0 && more) expect", "if (lane == 0 && more) expect"),
        ("sums overwritten before they are read", "if (step > 0) cluster_wait();", "if (step > 1) cluster_wait();"),
        ("readers that do not say they have read", "if (more) cluster_arrive();", ""),
        ("no end of the near rows", "has_low = row < p.weight_rows;", "has_low = true;"),
        ("no end of the far rows", "has_high = row + 8 < p.weight_rows;", "has_high = true;"),
        ("no end of K in the rows", "stream.last_k < p.K ? stream.last_k : p.K", "stream.last_k"),
        ("no end of K in x", "k < p.K ? q.x + (first_token + own.token) * q.x_stride + k : q.x, k < p.K ? 16 : 0", "q.x + (first_token + own.token) * q.x_stride + k, 16"),
        ("no end of the tokens", "8 * n + g < tokens ? 8 * n + g : tokens - 1", "8 * n + g"),
        ("tokens of the first tile", "(first_token + own.token) * q.x_stride", "own.token * q.x_stride"),
        ("outputs of the first tile", "finish_value(p, first_token + m, n,", "finish_value(p, m, n,"),
        ("rows of the first step", "row += next_rows; begin_row(p);", "row += next_rows;"),
        ("outputs of the first step", "(step * clusters + cluster) * teams", "cluster * teams"),
        ("a warp's columns not begun again", "k = first_k; row", "row"),
        ("columns of the team's first warp", "64 * (first + part) + 16 * t", "64 * first + 16 * t"),
        ("a slot multiplied out of turn", "slot + 1 == kFusedDepth ? 0 : slot + 1", "slot + 1 == kFusedDepth ? 1 : slot + 1"),
        ("multipliers of the first groups", "(k / 256 >> p.group_shift) * 4", "0"),
        ("multipliers of another group", "8 * (group % 4)", "8 * (group / 4 % 4)"),
        ("multipliers of another mask", "row + k % 64 / 16 * p.weight_rows", "row + (48 - k % 64) / 16 * p.weight_rows"),
        ("multipliers of the near row for the far one", "multipliers_of_row(far_words, group, t)", "multipliers_of_row(near_words, group, t)"),
        ("multipliers of two masks of a row", "return four_masks | shuffle_xor(four_masks, 2);", "return four_masks;"),
        ("multipliers that do not come with later groups", "of == first_k || of / 256", "of == first_k || first_k / 256"),
        ("no end of the multipliers", "far_word = far && n + 8 < p.N", "far_word = far"),
        ("no end of the near multipliers", "near_word = near && n < p.N", "near_word = near"),
        ("groups of 64 columns for 128", "const int group = b >> p.group_shift;", "const int group = b;"),
        ("largest of half the blocks", "own.inside && i < count; i +=", "own.inside && i < count / 2; i +="),
        ("largest of half the lanes", "int mask = lanes / 2; mask > 0; mask /= 2) { const", "int mask = lanes / 4; mask > 0; mask /= 2) { const"),
        ("largest of one token for all", "q.per_tensor ? tokens * own.parts : own.parts", "own.parts"),
        ("sums of half the lanes", "int mask = own.lanes / 2;", "int mask = own.lanes / 4;"),
        ("sums of codes of half the blocks", "i < (m + 1) * own.parts; ++i", "i < m * own.parts + own.parts / 2; ++i"),
        ("scale of another token", "store_shared(Layout::kScales + 4u * static_cast<uint32_t>(own.token), by.scale)", "store_shared(Layout::kScales + 4u * static_cast<uint32_t>(tokens - 1 - own.token), by.scale)"),
        ("codes on the banks of their neighbours", "static_cast<uint32_t>(token % 2) * 64", "static_cast<uint32_t>(token / 64) * 64"),
        ("sums of another warp's place", "(warp / q.team * kClusterBlocks + rank) * q.team + part)", "(warp / q.team * kClusterBlocks + rank) * q.team)"),
        ("wrong rows of a sum", "[i % 2 * 2 + to / 4]", "[(1 - i % 2) * 2 + to / 4]"),
        ("wrong tokens of a sum", "[i % 2 * 2 + to / 4]", "[i % 2 * 2 + 1 - to / 4]"),
        ("sums of another mask", "sums[to % 4]", "sums[(to + 1) % 4]"),
        ("parts of half the blocks", "const int parts = kClusterBlocks * q.team;", "const int parts = kClusterBlocks / 2 * q.team;"),
        ("rows past the end finished", "packed_row >= p.weight_rows || n >= p.N", "n >= p.N"),
        ("outputs past the end finished", "packed_row >= p.weight_rows || n >= p.N", "packed_row >= p.weight_rows"),
        ("tokens past the end finished", "if (m >= tokens || packed_row", "if (packed_row"),
        ("wrong order of the scales", "multiply(static_cast<float>(sum), by)", "multiply(multiply(static_cast<float>(sum), x_scale[j / 2]), scale[j % 2])"),
    ),
    *noticed_by_fused(faults_in(
        "csrc/cuda/linear.cu",
        "linear",
        ("codes not kept by one launch", "!weights.grouped() && !kept.codes && is_half", "!weights.grouped() && is_half"),
        ("float groups in one launch", "!weights.grouped() && !kept.codes && is_half", "!kept.codes && is_half"),
        ("misaligned multipliers in one launch", "aligned(weights.multiplier, weights.scale_columns, 4) && has_clusters()", "has_clusters()"),
        ("float32 taken for halves", "const bool is_half = x_type == BK_CUDA_BF16 || x_type == BK_CUDA_F16;", "const bool is_half = true;"),
        ("misaligned rows in one launch", "p.weight_vector && aligned(weights.multiplier, weights.scale_columns, 4) && has", "aligned(weights.multiplier, weights.scale_columns, 4) && has"),
        ("misaligned x in one launch", "is_half && is_vector(x, x_type, x_stride) &&", "is_half &&"),
        ("one scale of a tile's tokens for all", "(per_tensor || at_once < 1 ||", "(at_once < 1 ||"),
        ("steps of a cluster left out", "plan.steps = static_cast<int32_t>(steps);", "plan.steps = 1;"),
    )),
]  # fmt: skip
