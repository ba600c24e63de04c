"""The faults of the mutation test: what is replaced in which file, each found exactly once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        name: What is wrong.
        path: The file, from the repository's root.
        old: What stands there, exactly once; white space counts as one space.
        new: What is put in its place.
        unit: Stem of the source that is compiled with it; all others are the right ones.
    """

    name: str
    path: str
    old: str
    new: str
    unit: str


def _in(path: str, unit: str, *faults: tuple[str, ...]) -> list[Mutation]:
    """A fault is its name, old and new text and, where it is not the file's, its unit."""
    return [
        Mutation(fault[0], path, fault[1], fault[2], *(fault[3:] or (unit,))) for fault in faults
    ]


BARRIER = "sync_block();"
MUTATIONS = [
    *_in(
        "csrc/cuda/matmul.cuh",
        "ternary_int8",
        ("wrong mask", "0x03030303u << (2 * lane)", "0x03030303u << (2 * (lane ^ 1))"),
        (
            "wrong fragment index of A",
            "low.word[2 * h] & mask, high.word[2 * h] & mask, low.word[2 * h + 1] & mask,",
            "low.word[2 * h] & mask, low.word[2 * h + 1] & mask, high.word[2 * h] & mask,",
        ),
        (
            "wrong fragment index of B",
            "mma_u8s8(sums[lane][n], a, x[n][0].word[2 * h], x[n][0].word[2 * h + 1])",
            "mma_u8s8(sums[lane][n], a, x[n][0].word[2 * h + 1], x[n][0].word[2 * h])",
        ),
        (
            "wrong fragment index of int8 weights",
            "{low.word[2 * h], high.word[2 * h],",
            "{high.word[2 * h], low.word[2 * h],",
            "int8_int8",
        ),
        ("wrong shift of a lane", "return sum >> (2 * lane)", "return sum >> lane"),
        ("offset of the codes left in", "unshift(sum, lane) - static_cast", "unshift(sum, lane) + static_cast"),
        (
            "wrong order of the scales",
            "multiply(static_cast<float>(sum), multiply(load_global(p.x_scale + m), scale))",
            "multiply(multiply(static_cast<float>(sum), load_global(p.x_scale + m)), scale)",
        ),
        (
            "wrong order of the shares of K",
            "load_global(partial + i); for (int32_t part = 1; part < parts; ++part) sum =",
            "load_global(partial + (parts - 1) * outputs + i); for (int32_t part = parts - 2; part >= 0; --part) sum =",
        ),
        ("terms of the last group left out", "kGrouped ? p.columns : p.splits;", "kGrouped ? p.columns - 1 : p.splits;"),
        ("no end of K", "return k < p.K ? load_weights(row + k) : v;", "return load_weights(row + k);"),
        ("no end of K in misaligned rows", "k + i < p.K ? load_global(row + k + i) : 0", "load_global(row + k + i)"),
        ("wrong number taken from codes", "0xC301C301", "0xC300C300", "ternary_f32"),
        ("wrong number taken from codes, float16", "0xE401E401", "0xE400E400", "ternary_16"),
        (
            "wrong columns of float fragments",
            "x[n][2 * plane + q / 2]",
            "x[n][2 * plane + q % 2]",
            "ternary_f32",
        ),
        (
            "wrong bytes of float fragments",
            "const uint32_t codes = select_bytes(word >> (2 * lane), 0, selector) & 0x00030003;",
            "const uint32_t codes = select_bytes(word >> (2 * lane), 0, selector ^ 0x0101) & 0x00030003;",
            "ternary_f32",
        ),
        ("group's scale of another group", "n * p.columns + column));", "n * p.columns));"),
    ),
    *_in(
        "csrc/cuda/few.cuh",
        "ternary_int8",
        ("missing barrier before the sums are read", f"{BARRIER} BK_UNROLL for (int own = 0;", "BK_UNROLL for (int own = 0;"),
        ("missing barrier before the next groups", f"if (kGrouped) {BARRIER}", ""),
        (
            "no end of the rows",
            "(first_row + g + 8 < most ? first_row + g + 8 : most)",
            "(first_row + g + 8)",
        ),
        ("earlier kernels not waited for", "wait_for_previous();", ""),
        ("no end of the tokens", "(8 * n + g < p.M ? 8 * n + g : p.M - 1)", "(8 * n + g)"),
        ("a warp's blocks counted twice", "first + warp, last, kFewWarps, sums", "first + warp, last, 1, sums"),
        ("wrong row of a sum", "row = g + c / 2 * 8, token = 8 * n + 2 * t + c % 2;", "row = g + c % 2 * 8, token = 8 * n + 2 * t + c / 2;"),
        (
            "wrong order of the groups",
            "const Sum sum = load_shared<Sum>(at + 4u * static_cast<uint32_t>(w * kOutputs)); const int column = round * kFewWarps + w;",
            "const int v = (kFewWarps < p.columns - round * kFewWarps ? kFewWarps : p.columns - round * kFewWarps) - 1 - w; const Sum sum = load_shared<Sum>(at + 4u * static_cast<uint32_t>(v * kOutputs)); const int column = round * kFewWarps + v;",
        ),
        ("term written where another token's is", "(round * kFewWarps * p.M + m) * p.N + n", "round * kFewWarps * p.M * p.N + n"),
        ("groups of a share twice", "all_rounds * split / p.splits", "0 * split / p.splits"),
        ("outputs past the end written", "row >= p.weight_rows || n >= p.N", "row >= p.weight_rows"),
    ),
    *_in(
        "csrc/cuda/many.cuh",
        "ternary_int8",
        ("missing barrier in the pipeline", f"wait_async<kStages - 2>(); {BARRIER}", "wait_async<kStages - 2>();"),
        ("one copy too few waited for", "wait_async<kStages - 2>()", "wait_async<kStages - 1>()"),
        ("stage filled while it is read", "stage == 0 ? kStages - 1 : stage - 1", "stage"),
        ("no swizzle", "chunk ^ (token & 1)", "chunk ^ (token & 0)", "ternary_f32"),
        ("no end of the tokens", "first_token + token < p.M ? first_token + token : p.M - 1", "first_token + token"),
        ("no end of K", "k < p.K ? from + k : from, k < p.K ? 16 : 0", "from + k, 16"),
        ("wrong row of a fragment", "(row + 8) * 64", "(row + 4) * 64"),
        ("wrong row of a sum", "int row = warp / 2 * 16 + g + c / 2 * 8", "int row = warp / 2 * 16 + g + c % 2 * 8"),
        ("missing barrier before a tile is staged", f"{BARRIER}  // the last stage has been read, or the tile of the lane before", ""),
        ("missing barrier before a staged tile is read", f"stage_tile<Tile>(sums[lane]); }} {BARRIER}", "stage_tile<Tile>(sums[lane]); }"),
        ("wrong end of a group", "++in_group == p.group_blocks", "++in_group > p.group_blocks"),
        ("last block of a share left out", "static_cast<int64_t>(p.blocks) * (split + 1) / p.splits)", "static_cast<int64_t>(p.blocks) * (split + 1) / p.splits - 1)"),
    ),
    *_in(
        "csrc/cuda/wgmma.cuh",
        "ternary_wgmma",
        ("earlier kernels not waited for", "begin();", ""),
        ("wrong stride of the descriptor", "kEightRows = 1024 / 16", "kEightRows = 512 / 16"),
        ("wrong swizzle of the tokens", "chunk ^ (token % 8)", "chunk ^ (token % 4)"),
        ("wrong kind of the descriptor", "1ull << 62", "2ull << 62"),
        ("no swizzle of the rows", "chunk ^ (row % 2 * 4)", "chunk ^ (row % 2 * 0)"),
        ("missing proxy fence", "fence_async_proxy();", ""),
        ("proxy fence after the barrier", f"fence_async_proxy(); {BARRIER}", f"{BARRIER} fence_async_proxy();"),
        ("proxy fence before the copies are there", "wait_async<kAhead - 1>(); fence_async_proxy();", "fence_async_proxy(); wait_async<kAhead - 1>();"),
        ("missing barrier in the pipeline", f"fence_async_proxy(); {BARRIER}", "fence_async_proxy();"),
        ("one copy too few waited for", "wait_async<kAhead - 1>()", "wait_async<kAhead>()"),
        ("missing wait before A is masked", "wgmma_wait<1>();", ""),
        ("one group too many runs on", "wgmma_wait<1>();", "wgmma_wait<2>();"),
        ("missing wait before the sums are read", "wgmma_wait<0>();", ""),
        ("missing fence of the registers", "wgmma_fence();", ""),
        ("missing commit", "wgmma_commit();", ""),
        ("copies run on into the tiles of sums", "wait_async<0>();", ""),
        ("a stage filled while wgmma reads it", "constexpr int kAhead = Layout::kStages - 2;", "constexpr int kAhead = Layout::kStages - 1;"),
        ("missing barrier before the sums are written", f"wgmma_take(sums[lane]); {BARRIER}", "wgmma_take(sums[lane]);"),
        ("missing barrier before the sums are finished", f"{BARRIER} }} BK_NO_UNROLL", "} BK_NO_UNROLL"),
        ("missing barrier before the sums are added", f"}} }} {BARRIER} if (kGroups > 1) {{", "} } if (kGroups > 1) {"),
        ("sums of the other half not added", "load_shared<int32_t>(at) + sums", "sums"),
        ("columns of the other warpgroup", "(kGroups * step + part)", "(kGroups * step)"),
        ("wrong columns of a wgmma", "32u * static_cast<uint32_t>(h)", "32u * static_cast<uint32_t>(1 - h)"),
        ("registers of both halves alike", "1, false, a[1], sums)", "1, false, a[0], sums)"),
        ("sums of another block kept", "h == 1 || !is_first", "true"),
        ("first product of every step left out", "0, step == first, a[0], sums)", "0, true, a[0], sums)"),
        ("no end of the rows or tokens", "r < count ? r : count - 1", "r"),
        ("no end of K in the rows", "row_end(p.K)", "row_end(p.K + 16)"),
        ("no end of K in the tokens", "token_end(64 * p.blocks)", "token_end(64 * p.blocks + 64)"),
        ("last step of a share left out", "steps * (split + 1) / p.splits)", "steps * (split + 1) / p.splits - 1)"),
        ("wrong row of a sum", "g + i % 4 / 2 * 8", "g + i % 2 * 8"),
    ),
    *_in(
        "csrc/cuda/epilogue.cuh",
        "ternary_wgmma",
        ("no end of the outputs", "rows < outputs ? rows : outputs", "rows"),
        ("no end of the rows", "rows < outputs ? rows : outputs", "outputs"),
        ("no end of the tokens", "if (m >= p.M) break;", ""),
        ("loads past the tokens", "first_token + token < p.M ? first_token + token : p.M - 1", "first_token + token"),
        ("outputs of another mask", "row + lane * p.weight_rows", "row"),
        ("wrong order of the scales", "Math::kIsInteger ? multiply(x_scale[j], scale[i]) : scale[i]; float value = multiply(sum_value(values[j].word[i], Sum{}), factor);", "scale[i]; float value = multiply(multiply(sum_value(values[j].word[i], Sum{}), x_scale[j]), factor);"),
        ("offset of the codes in a share", "kShifted && !is_share ?", "kShifted ?"),
        ("share of another split", "split * p.M * p.N + index", "index"),
        ("halves of a pair exchanged", "half[0] | half[1] << 16", "half[1] | half[0] << 16"),
        ("misaligned store of words", "reinterpret_cast<uintptr_t>(to) % 16 == 0", "true"),
        ("misaligned store of pairs", "reinterpret_cast<uintptr_t>(to) % 8 == 0", "true"),
    ),
    *_in(
        "csrc/cuda/gemv.cuh",
        "linear",
        ("missing barrier before the sums are read", f"a); }} {BARRIER}", "a); }"),
        ("sums overwritten while they are read", "set ^= 1;", ""),
        ("earlier kernels not waited for", "begin();", ""),
        ("wrong lane of a sum", "2 * (lane & 1) + (lane >> 1 & 1)", "2 * (lane >> 1 & 1) + (lane & 1)"),
        ("codes not padded", "if (k < padded) store_shared(static_cast<uint32_t>(k), codes);", "if (k < p.K - 8) store_shared(static_cast<uint32_t>(k), codes);"),
        ("one term overwritten while it is read", "(set * p.columns) * stride", "(0 * p.columns) * stride"),
        ("offset of another block's codes", "block_sums + 4u * static_cast<uint32_t>(at / 64)", "block_sums + 4u * static_cast<uint32_t>(at / 64 / 2)"),
        ("half of a group's lanes", "mask < 4 * p.group_blocks; mask *= 2", "mask < 2 * p.group_blocks; mask *= 2"),
        ("scale of another output", "p.weight_scale + n * p.columns", "p.weight_scale + row * p.columns"),
        ("sum of half the columns of a block", "mask = 1; mask < 8; mask *= 2", "mask = 1; mask < 4; mask *= 2"),
        (
            "terms added in another order",
            "own_terms + static_cast<uint32_t>(group) * stride +",
            "own_terms + static_cast<uint32_t>(p.columns - 1 - group) * stride +",
        ),
        ("no end of the rows", "(p, row < p.weight_rows ? row : p.weight_rows - 1)", "(p, row)"),
        ("next row's bytes not loaded", "const int32_t next_k = is_last ?", "const int32_t next_k = !more ?"),
    ),
    *_in(
        "csrc/cuda/activations.cuh",
        "linear",
        ("codes cut off, not rounded", "by.finite ? round_even(value) : 0", "by.finite ? static_cast<int32_t>(value) : 0"),
        ("one rounding more", "return {divide(127.0f, m),", "return {multiply(127.0f, divide(1.0f, m)),"),
        ("sum of half the columns", "sum += shuffle_xor(sum, 4);", ""),
        ("missing barrier before the sums", f"if (!p.sums) return; {BARRIER}", "if (!p.sums) return;"),
        ("codes past the row written", "if (k < padded) store_global(reinterpret_cast<Bytes8 *>", "store_global(reinterpret_cast<Bytes8 *>"),
        ("wrong place of a column", "c / 8 % 2 * 32 + c / 4 % 2 * 16", "c / 4 % 2 * 32 + c / 8 % 2 * 16"),
        ("words of neighbours exchanged", "eight.word[odd ? 0 : 1], 2)", "eight.word[odd ? 0 : 1], 4)"),
        ("places past the row written", "if (k < padded) { store_global(reinterpret_cast<Bytes8 *>(row +", "{ store_global(reinterpret_cast<Bytes8 *>(row +"),
        ("a plane not taken off", "values[i] = add(values[i], -bits_float(low));", ""),
    ),
    *_in(
        "csrc/cuda/types.cuh",
        "linear",
        ("largest of half the lanes", "int mask = 16; mask > 0; mask /= 2) { const", "int mask = 8; mask > 0; mask /= 2) { const"),
        ("no end of a row", "index + i < count ? load_float(row, type, index + i) : 0.0f", "load_float(row, type, index + i)"),
        ("columns past the end unpacked", "if (i < count) store_float(p, type, index + i, values[i])", "store_float(p, type, index + i, values[i])", "weights"),
    ),
    *_in(
        "csrc/cuda/gradient.cuh",
        "gradient",
        ("missing barrier after the tiles are written", f"}} }} }} {BARRIER} if (passes", "} } } if (passes"),
        ("missing barrier before the next tiles", f"}} {BARRIER} }} }} const float scale", "} } } const float scale"),
        ("wrong lanes of a byte", "pair_of_lanes<kIsBf16>(near, 2)", "pair_of_lanes<kIsBf16>(near, 0)"),
        ("wrong column of a tile", "c / 2 * 32 + 4 * g + j", "c / 2 * 32 + 4 * j + g"),
        ("scale of another group", "n * p.columns + group", "n * p.columns"),
        ("outputs past the end read", "first_row + row < p.rows && n < p.N && m < p.M", "m < p.M"),
    ),
    *_in(
        "csrc/cuda/weights.cuh",
        "weights",
        ("chains added in another order", "lane / kChains * kChains + l)", "lane / kChains * kChains + kChains - l)"),
        ("rows added in another order", "load_shared<double>(8 * i)", "load_shared<double>(8 * ((p.parts < kWeightThreads ? static_cast<uint32_t>(p.parts) : kWeightThreads) - 1 - i))"),
        ("missing barrier of the rows' sums", f"own); {BARRIER}", "own);"),
        ("rows overwritten while they are added", f"load_shared<double>(8 * i)); }} {BARRIER}", "load_shared<double>(8 * i)); }"),
        ("padding written as another code", "float values[8] = {}, inverse = 0.0f;", "float values[8] = {1.0f}, inverse = 1.0f;"),
        ("columns past the end packed", "if (k + j < p.K) store_global(to + j", "store_global(to + j"),
        ("ties rounded up", "ratio > 0.5f ? 2", "ratio >= 0.4999f ? 2"),
    ),
    *_in(
        "csrc/cuda/linear.cu",
        "linear",
        ("codes of one token not kept", "x_type != BK_CUDA_I8 && !kept.codes", "x_type != BK_CUDA_I8"),
        ("codes of wgmma kept in its order", "plan.wgmma ? own : nullptr;", "plan.wgmma ? (kept.codes ? kept.codes : own) : nullptr;"),
        ("codes not kept", "kept.codes ? kept.codes : plan.wgmma", "plan.wgmma"),
    ),
    *_in(
        "tests/native/cuda/fragments.h",
        "emulator",
        ("wrong fragment table of A", "((i / 4) % 2) * 8, in_group * 4 + i % 4 + (i / 8) * 16", "(i / 8) * 8, in_group * 4 + i % 4 + ((i / 4) % 2) * 16"),
        ("wrong fragment table of A of wgmma", "(i >= 4 && i < 8) || i >= 12", "i >= 8"),
        ("wrong fragment table of D of wgmma", "i / 4 * 8 + 2 * in_group + (i & 1)", "i / 4 * 8 + in_group + 4 * (i & 1)"),
        ("wrong fragment table of C", "lane / 4 + (i / 2) * 8, (lane % 4) * 2 + i % 2", "lane / 4 + (i % 2) * 8, (lane % 4) * 2 + i / 2"),
    ),
]  # fmt: skip
