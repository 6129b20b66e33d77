"""The Triton kernels of `triton.py`. They read keys and values through the block table.

KIND is what the cache has: 0 the numbers themselves, 1 whole numbers of 8 bits, 2 floats of 8 bits (e4m3) as
bytes; of 1 and 2 each head of each token has a scale. Floats of 8 bits are taken apart by their bits, since
GPUs before Hopper have no instruction for them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _slots(table, positions, is_inside, BLOCK_SIZE: tl.constexpr):
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=is_inside, other=0)
    return blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def _widen(numbers, like, KIND: tl.constexpr):
    """Numbers of the cache in the type of `like`; those of e4m3 are 2^-8 of what they are."""
    if KIND == 2:
        # In a float of 16 bits the exponent has one bit more, and there are 7 more bits behind.
        wide = numbers.to(tl.int16)
        numbers = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return numbers.to(like.dtype)


@triton.jit
def _narrow(x, KIND: tl.constexpr):
    """x float32, of at most 127 or 448, to the nearest whole number, or the bits of the nearest e4m3."""
    if KIND == 1:
        shift = 12582912.0  # 1.5 · 2^23: adding it rounds to an integer
        numbers = ((x + shift) - shift).to(tl.int8)
    else:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = (size + 0x7FFFF + ((size >> 20) & 1) - (120 << 23)) >> 20
        small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
        numbers = tl.where(size < (121 << 23), small, normal)  # below 2^-6 in steps of 2^-9
        numbers = (numbers | ((bits >> 24) & 0x80)).to(tl.uint8)
    return numbers


@triton.jit
def _attend(
    q, keys, values, key_scales, value_scales, table, positions, is_seen, is_inside, best, total, out, scale,
    slot_stride, scale_stride, BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """One iteration of the online softmax, in base 2: q [rows, dim] and the keys at `positions` [tile]."""
    dims = tl.arange(0, DIM_PADDED)
    slots = _slots(table, positions, is_inside, BLOCK_SIZE)
    is_there = is_inside[:, None] & (dims < DIM)[None, :]
    places = slots[:, None] * slot_stride + dims[None, :]
    unit: tl.constexpr = 256.0 if KIND == 2 else 1.0
    k = _widen(tl.load(keys + places, mask=is_there, other=0), q, KIND)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if KIND != 0:
        scores *= (unit * tl.load(key_scales + slots * scale_stride, mask=is_inside, other=0.0))[None, :]
    scores = tl.where(is_seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    # A row without any key so far has -inf here: -inf - -inf would be NaN.
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(best - shift)
    total = total * keep + tl.sum(weights, 1)
    v = _widen(tl.load(values + places, mask=is_there, other=0), q, KIND)
    if KIND != 0:
        weights *= (unit * tl.load(value_scales + slots * scale_stride, mask=is_inside, other=0.0))[None, :]
    out = out * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_best, total, out


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables", "lengths"])
def decode_kernel(
    q, cache, scales, tables, lengths, out, sums, scale,
    q_stride, slot_stride, scale_stride, table_stride, out_stride, split_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Program (sequence, kv head, split).

    Writes the split's output, and log2 of its sum of weights (−inf without keys).
    """
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    per_split = tl.cdiv(tl.cdiv(length, TILE), NUM_SPLITS) * TILE
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PADDED)
    heads = kv_head * GROUP + rows
    is_head = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    queries = tl.load(q + sequence * q_stride + heads[:, None] * DIM + dims[None, :], mask=is_head, other=0.0)
    keys, key_scales = cache + kv_head * DIM, scales + kv_head
    values = keys + NUM_KV_HEADS * DIM
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for start in range(first, last, TILE):
        positions = start + tl.arange(0, TILE)
        is_inside = positions < last
        best, total, found = _attend(
            queries, keys, values, key_scales, key_scales + NUM_KV_HEADS, tables + sequence * table_stride,
            positions, is_inside[None, :], is_inside, best, total, found, scale, slot_stride, scale_stride,
            BLOCK_SIZE, PRECISION, KIND, DIM, DIM_PADDED,
        )  # fmt: skip
    sum_or_1 = tl.where(total > 0, total, 1.0)  # 0 for a split without keys
    found = found / sum_or_1[:, None]
    places = sequence * out_stride + split * split_stride + heads[:, None] * DIM + dims[None, :]
    tl.store(out + places, found.to(out.dtype.element_ty), mask=is_head)
    if NUM_SPLITS > 1:
        num_heads = NUM_KV_HEADS * GROUP
        tl.store(
            sums + (sequence * NUM_SPLITS + split) * num_heads + heads,
            best + tl.log2(sum_or_1),
            mask=rows < GROUP,
        )


@triton.jit
def merge_kernel(
    parts, sums, out, out_stride,
    NUM_HEADS: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head): the splits' outputs, averaged by their sums of weights."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    splits, dims = tl.arange(0, SPLITS_PADDED), tl.arange(0, DIM_PADDED)
    is_split, is_dim = splits < NUM_SPLITS, dims < DIM
    of_split = (sequence * NUM_SPLITS + splits) * NUM_HEADS + head
    logs = tl.load(sums + of_split, mask=is_split, other=float("-inf"))
    shares = tl.exp2(logs - tl.max(logs, 0))
    found = tl.load(
        parts + of_split[:, None] * DIM + dims[None, :],
        mask=is_split[:, None] & is_dim[None, :],
        other=0.0,
    )
    merged = tl.sum(found * shares[:, None], 0) / tl.sum(shares, 0)
    tl.store(out + sequence * out_stride + head * DIM + dims, merged.to(out.dtype.element_ty), mask=is_dim)


# No specialisation on values that differ between steps: a compilation would stop the streams.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables", "lengths"])
def prefill_kernel(
    q, cache, scales, tables, lengths, starts, tile_sequences, tile_offsets, out, scale,
    q_stride, slot_stride, scale_stride, table_stride, out_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries of one sequence, head).

    `starts` [num_sequences + 1]: where each sequence's queries begin in q.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence, offset = tl.load(tile_sequences + tile), tl.load(tile_offsets + tile)
    start = tl.load(starts + sequence)
    num_queries = tl.load(starts + sequence + 1) - start
    length = tl.load(lengths + sequence)
    rows, dims = offset + tl.arange(0, ROWS), tl.arange(0, DIM_PADDED)
    is_query = (rows < num_queries)[:, None] & (dims < DIM)[None, :]
    queries = tl.load(
        q + (start + rows)[:, None].to(tl.int64) * q_stride + head * DIM + dims[None, :],
        mask=is_query,
        other=0.0,
    )
    own = length - num_queries + rows  # the positions of the queries
    last = tl.minimum(length, length - num_queries + offset + ROWS)
    keys, key_scales = cache + head // GROUP * DIM, scales + head // GROUP
    values = keys + NUM_KV_HEADS * DIM
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for first in range(0, last, TILE):
        positions = first + tl.arange(0, TILE)
        is_inside = positions < last
        is_seen = (positions[None, :] <= own[:, None]) & is_inside[None, :]
        best, total, found = _attend(
            queries, keys, values, key_scales, key_scales + NUM_KV_HEADS, tables + sequence * table_stride,
            positions, is_seen, is_inside, best, total, found, scale, slot_stride, scale_stride,
            BLOCK_SIZE, PRECISION, KIND, DIM, DIM_PADDED,
        )  # fmt: skip
    found = found / tl.where(total > 0, total, 1.0)[:, None]
    places = (start + rows)[:, None].to(tl.int64) * out_stride + head * DIM + dims[None, :]
    tl.store(out + places, found.to(out.dtype.element_ty), mask=is_query)


@triton.jit
def norm_rotate_and_write_kernel(
    qkv, bias, q_norm, k_norm, cos, sin, new_slots, cache, scales, eps, qkv_stride, slot_stride, scale_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Program (token): adds the bias, norms and rotates queries and keys.

    Writes queries back in place, and keys and values to the cache. A head's numbers are taken in pairs: the
    first TURNED pairs, of its first 2 · TURNED numbers, are rotated; the others are paired in any way.
    """
    token = tl.program_id(0).to(tl.int64)
    heads, halves = tl.arange(0, HEADS_PADDED), tl.arange(0, HALF_PADDED)
    is_half = halves < HALF
    is_there = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & is_half[None, :]
    is_query_head = (heads < NUM_HEADS)[:, None]
    is_turned = (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
    ones = tl.where(halves < TURNED, halves, halves + TURNED)
    others = tl.where(halves < TURNED, halves + TURNED, halves + HALF)
    inside = heads[:, None] * (2 * HALF) + ones[None, :]
    opposite = heads[:, None] * (2 * HALF) + others[None, :]
    first = tl.load(qkv + token * qkv_stride + inside, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(qkv + token * qkv_stride + opposite, mask=is_there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        first += tl.load(bias + inside, mask=is_there, other=0.0).to(tl.float32)
        second += tl.load(bias + opposite, mask=is_there, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        factors = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        q_first = tl.load(q_norm + ones, mask=is_half, other=0.0).to(tl.float32)[None, :]
        q_second = tl.load(q_norm + others, mask=is_half, other=0.0).to(tl.float32)[None, :]
        k_first = tl.load(k_norm + ones, mask=is_half, other=0.0).to(tl.float32)[None, :]
        k_second = tl.load(k_norm + others, mask=is_half, other=0.0).to(tl.float32)[None, :]
        first = tl.where(is_turned, first * factors * tl.where(is_query_head, q_first, k_first), first)
        second = tl.where(is_turned, second * factors * tl.where(is_query_head, q_second, k_second), second)
    c = tl.load(cos + token * TURNED + halves, mask=halves < TURNED, other=1.0)[None, :]
    s = tl.load(sin + token * TURNED + halves, mask=halves < TURNED, other=0.0)[None, :]
    low = tl.where(is_turned, first * c - second * s, first)
    high = tl.where(is_turned, second * c + first * s, second)
    is_query = is_there & is_query_head
    tl.store(qkv + token * qkv_stride + inside, low.to(qkv.dtype.element_ty), mask=is_query)
    tl.store(qkv + token * qkv_stride + opposite, high.to(qkv.dtype.element_ty), mask=is_query)
    slot = tl.load(new_slots + token).to(tl.int64)
    is_cached = is_there & (heads >= NUM_HEADS)[:, None]
    place = slot * slot_stride - NUM_HEADS * 2 * HALF
    if KIND == 0:
        tl.store(cache + place + inside, low.to(cache.dtype.element_ty), mask=is_cached)
        tl.store(cache + place + opposite, high.to(cache.dtype.element_ty), mask=is_cached)
    else:
        most = tl.maximum(tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1)), 1e-30)
        largest: tl.constexpr = 127.0 if KIND == 1 else 448.0
        up = (largest / most)[:, None]
        tl.store(cache + place + inside, _narrow(low * up, KIND), mask=is_cached)
        tl.store(cache + place + opposite, _narrow(high * up, KIND), mask=is_cached)
        of_head = slot * scale_stride - NUM_HEADS + heads
        is_kept = (heads >= NUM_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS)
        # NaN where a number is not finite: the maximum may have passed over it.
        rest = tl.sum((low - low) + (high - high), 1)
        tl.store(scales + of_head, most / largest + rest, mask=is_kept)
