"""The Triton kernels of `triton.py`: a layer of Gated DeltaNet between its projections.

A key head is shared by GROUP value heads. Sums are in float32. Products between tokens take numbers in the
model's type, as tensor cores do; the system that tokens of a chunk make is solved in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# No specialisation on values that differ between steps: a compilation would stop the streams. Tables and
# gates begin anywhere in their tensors, and drafts have copies of their gates, without those between them.
TABLES = ["slots", "span_starts", "shifts", "sequences", "numbers"]
UNALIGNED = [*TABLES, "b", "a", "b_stride", "a_stride"]
MIN_DOT = tl.constexpr(16)  # numbers along each side of a product, at least


@triton.jit
def _log_fade(a, fade_bias, decay, head):
    """g, of the numbers `a`: -decay · softplus(a + fade_bias)."""
    x = a.to(tl.float32) + tl.load(fade_bias + head)
    return -tl.load(decay + head) * (tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))))


@triton.jit
def _gated(found, z, gain, eps, SIZE: tl.constexpr):
    """The norm of found [rows, values], times the weight gain [values] and SiLU of z [rows, values]."""
    scale = tl.rsqrt(tl.sum(found * found, 1) / SIZE + eps)
    wide = z.to(tl.float32)
    return found * scale[:, None] * gain[None, :] * (wide * tl.sigmoid(wide))


@triton.jit
def _step_inputs(x, inputs, taps, channels, is_channel, NUM_CHANNELS: tl.constexpr, NUM_TAPS: tl.constexpr):
    """One token's convolution of some channels, and SiLU. Its input becomes the last one that is kept.

    Several threads may read the same input: none is overwritten before all have read it.
    """
    new = tl.load(x + channels, mask=is_channel, other=0.0)
    weight = tl.load(taps + (NUM_TAPS - 1) * NUM_CHANNELS + channels, mask=is_channel, other=0.0)
    total = new.to(tl.float32) * weight
    for tap in tl.static_range(NUM_TAPS - 1):
        kept = tl.load(inputs + tap * NUM_CHANNELS + channels, mask=is_channel, other=0.0)
        weight = tl.load(taps + tap * NUM_CHANNELS + channels, mask=is_channel, other=0.0)
        total += kept.to(tl.float32) * weight
    tl.debug_barrier()
    for tap in tl.static_range(1, NUM_TAPS - 1):
        kept = tl.load(inputs + tap * NUM_CHANNELS + channels, mask=is_channel, other=0.0)
        tl.store(inputs + (tap - 1) * NUM_CHANNELS + channels, kept, mask=is_channel)
    if NUM_TAPS > 1:
        new = new.to(inputs.dtype.element_ty)
        tl.store(inputs + (NUM_TAPS - 2) * NUM_CHANNELS + channels, new, mask=is_channel)
    return total * tl.sigmoid(total)


@triton.jit
def _advance(state, q, k, v, fade, share):
    """The rule for one token: the state [keys, values] behind it, and its output [1, values].

    q, k [keys, 1], v [values], fade: a factor.
    """
    state = state * fade
    write = (v - tl.sum(state * k, 0)) * share
    state += k * write[None, :]
    return state, tl.sum(state * q, 0)[None, :]


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def delta_decode_kernel(
    x, z, b, a, slots, inputs, memory, taps, decay, fade_bias, gain, out, eps, length_eps,
    x_stride, z_stride, b_stride, a_stride, inputs_stride, memory_stride, out_stride,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, NUM_TAPS: tl.constexpr,
):  # fmt: skip
    """Program (sequence, key head): one token through the whole layer.

    All that it changes of the states is its own: the inputs of its channels, and its heads' memory.
    """
    row, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    NUM_CHANNELS: tl.constexpr = KEY_HEADS * (2 * KEY_DIM + GROUP * VALUE_DIM)
    slot = tl.load(slots + row).to(tl.int64)
    x += row * x_stride
    inputs += slot * inputs_stride
    keys, values = tl.arange(0, KEY_PADDED), tl.arange(0, VALUE_PADDED)
    is_key, is_value = keys < KEY_DIM, values < VALUE_DIM
    channels = key_head * KEY_DIM + keys
    q = _step_inputs(x, inputs, taps, channels, is_key, NUM_CHANNELS, NUM_TAPS)
    k = _step_inputs(x, inputs, taps, KEY_HEADS * KEY_DIM + channels, is_key, NUM_CHANNELS, NUM_TAPS)
    q = (q * tl.rsqrt((tl.sum(q * q, 0) + length_eps) * KEY_DIM))[:, None]
    k = (k * tl.rsqrt(tl.sum(k * k, 0) + length_eps))[:, None]
    weight = tl.load(gain + values, mask=is_value, other=0.0)
    for member in range(GROUP):
        head = key_head * GROUP + member
        of_values = 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + values
        v = _step_inputs(x, inputs, taps, of_values, is_value, NUM_CHANNELS, NUM_TAPS)
        fade = tl.exp(_log_fade(tl.load(a + row * a_stride + head), fade_bias, decay, head))
        share = tl.sigmoid(tl.load(b + row * b_stride + head).to(tl.float32))
        places = memory + slot * memory_stride + head * KEY_DIM * VALUE_DIM
        places = places + keys[:, None] * VALUE_DIM + values[None, :]
        is_there = is_key[:, None] & is_value[None, :]
        state = tl.load(places, mask=is_there, other=0.0)
        state, found = _advance(state, q, k, v, fade, share)
        tl.store(places, state, mask=is_there)
        gates = tl.load(z + row * z_stride + head * VALUE_DIM + values, mask=is_value, other=0.0)
        gated = _gated(found, gates[None, :], weight, eps, VALUE_DIM)
        place = out + row * out_stride + head * VALUE_DIM + values
        tl.store(place[None, :], gated.to(out.dtype.element_ty), mask=is_value[None, :])


@triton.jit
def _span_of(sequence, span_starts):
    """The sequence's first token of the step, and the number of its tokens."""
    start = tl.load(span_starts + sequence).to(tl.int32)
    return start, tl.load(span_starts + sequence + 1).to(tl.int32) - start


@triton.jit
def _chunk_of(chunk, sequences, numbers, span_starts, shifts, SIZE: tl.constexpr):
    """A chunk's first row among the tokens of the step, int64, and the sequence's first and last one.

    The chunk's rows before the first token and behind the last one belong to other sequences, or to none.
    """
    sequence = tl.load(sequences + chunk)
    start, count = _span_of(sequence, span_starts)
    first = tl.load(numbers + chunk).to(tl.int32) * SIZE - tl.load(shifts + sequence).to(tl.int32)
    return (start + first).to(tl.int64), start, start + count - 1


@triton.jit
def _are_rows(first, first_token, last_token, SIZE: tl.constexpr):
    """Which of SIZE rows from `first` on are tokens of the sequence."""
    rows = first.to(tl.int32) + tl.arange(0, SIZE)
    return (rows >= first_token) & (rows <= last_token)


@triton.jit
def _load_rows(x, is_row, stride, columns, is_column, SIZE: tl.constexpr):
    """[SIZE, columns] of a matrix from `x` on."""
    places = tl.arange(0, SIZE)[:, None] * stride + columns[None, :]
    return tl.load(x + places, mask=is_row[:, None] & is_column[None, :], other=0.0)


@triton.jit
def _store_rows(x, found, is_row, stride, columns, is_column, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)[:, None] * stride + columns[None, :]
    tl.store(x + places, found.to(x.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def delta_convolve_kernel(
    x, slots, span_starts, shifts, sequences, numbers, inputs, taps, out, length_eps,
    x_stride, inputs_stride,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr, NUM_TAPS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (chunk, head, part of the chunk): convolution, SiLU, and the length of queries and keys.

    Heads are those of queries, then of keys, then of values.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    NUM_CHANNELS: tl.constexpr = KEY_HEADS * (2 * KEY_DIM + GROUP * VALUE_DIM)
    first, first_token, last_token = _chunk_of(chunk, sequences, numbers, span_starts, shifts, SIZE)
    first += tl.program_id(2) * ROWS
    is_row = _are_rows(first, first_token, last_token, ROWS)
    rows = first.to(tl.int32) - first_token + tl.arange(0, ROWS)
    inputs += tl.load(slots + tl.load(sequences + chunk)).to(tl.int64) * inputs_stride
    is_value, dims = head >= 2 * KEY_HEADS, tl.arange(0, DIM_PADDED)
    values_before = tl.maximum(head - 2 * KEY_HEADS, 0)
    channels = tl.minimum(head, 2 * KEY_HEADS) * KEY_DIM + values_before * VALUE_DIM + dims
    is_dim = dims < tl.where(is_value, VALUE_DIM, KEY_DIM)
    total = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for tap in tl.static_range(NUM_TAPS):
        taken = rows - (NUM_TAPS - 1) + tap
        of_step = x + (first - (NUM_TAPS - 1) + tap) * x_stride
        new = _load_rows(of_step, is_row & (taken >= 0), x_stride, channels, is_dim, ROWS)
        places = (taken + NUM_TAPS - 1)[:, None] * NUM_CHANNELS + channels[None, :]
        kept = tl.load(inputs + places, mask=(is_row & (taken < 0))[:, None] & is_dim[None, :], other=0.0)
        weight = tl.load(taps + tap * NUM_CHANNELS + channels, mask=is_dim, other=0.0)
        total += (new.to(tl.float32) + kept.to(tl.float32)) * weight[None, :]  # one of them is 0
    total = total * tl.sigmoid(total)
    squares = tl.sum(total * total, 1) + length_eps
    scales = tl.rsqrt(tl.where(head < KEY_HEADS, squares * KEY_DIM, squares))
    total = total * tl.where(is_value, 1.0, scales)[:, None]
    _store_rows(out + first * NUM_CHANNELS, total, is_row, NUM_CHANNELS, channels, is_dim, ROWS)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def delta_keep_kernel(
    x, slots, span_starts, inputs, x_stride, inputs_stride,
    NUM_CHANNELS: tl.constexpr, NUM_KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (sequence, block of channels): keeps the last inputs, once all convolutions have read them.

    A channel's inputs are one thread's: each is read before another is written over it.
    """
    sequence, channels = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = channels < NUM_CHANNELS
    start, count = _span_of(sequence, span_starts)
    inputs += tl.load(slots + sequence).to(tl.int64) * inputs_stride
    for number in tl.static_range(NUM_KEPT):
        taken = count - NUM_KEPT + number + tl.zeros([BLOCK], tl.int32)
        place = (start + taken).to(tl.int64) * x_stride
        new = tl.load(x + place + channels, mask=is_channel & (taken >= 0), other=0.0)
        place = (taken + NUM_KEPT) * NUM_CHANNELS
        kept = tl.load(inputs + place + channels, mask=is_channel & (taken < 0), other=0.0)
        last = tl.where(taken >= 0, new.to(inputs.dtype.element_ty), kept)
        tl.store(inputs + number * NUM_CHANNELS + channels, last, mask=is_channel)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def delta_walk_kernel(
    mixed, z, b, a, slots, span_starts, memory, decay, fade_bias, gain, out, eps,
    z_stride, b_stride, a_stride, memory_stride, out_stride,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """Program (sequence, value head): the rule token by token, and the norm with a gate."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    NUM_CHANNELS: tl.constexpr = KEY_HEADS * (2 * KEY_DIM + GROUP * VALUE_DIM)
    keys, values = tl.arange(0, KEY_PADDED), tl.arange(0, VALUE_PADDED)
    is_key, is_value = keys < KEY_DIM, values < VALUE_DIM
    memory += tl.load(slots + sequence).to(tl.int64) * memory_stride + head * KEY_DIM * VALUE_DIM
    state = _load_rows(memory, is_key, VALUE_DIM, values, is_value, KEY_PADDED)
    weight = tl.load(gain + values, mask=is_value, other=0.0)
    start, count = _span_of(sequence, span_starts)
    for number in range(count):
        token = (start + number).to(tl.int64)
        q = mixed + token * NUM_CHANNELS + head // GROUP * KEY_DIM + keys
        k = tl.load(q + KEY_HEADS * KEY_DIM, mask=is_key, other=0.0).to(tl.float32)[:, None]
        q = tl.load(q, mask=is_key, other=0.0).to(tl.float32)[:, None]
        v = mixed + token * NUM_CHANNELS + 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + values
        v = tl.load(v, mask=is_value, other=0.0).to(tl.float32)
        fade = tl.exp(_log_fade(tl.load(a + token * a_stride + head), fade_bias, decay, head))
        share = tl.sigmoid(tl.load(b + token * b_stride + head).to(tl.float32))
        state, found = _advance(state, q, k, v, fade, share)
        gates = tl.load(z + token * z_stride + head * VALUE_DIM + values, mask=is_value, other=0.0)
        gated = _gated(found, gates[None, :], weight, eps, VALUE_DIM)
        place = out + token * out_stride + head * VALUE_DIM + values
        tl.store(place[None, :], gated.to(out.dtype.element_ty), mask=is_value[None, :])
    _store_rows(memory, state, is_key, VALUE_DIM, values, is_value, KEY_PADDED)


@triton.jit
def _invert(system, SIZE: tl.constexpr):
    """(1 + system)⁻¹ [SIZE, SIZE], for numbers below the diagonal only: row by row, from those above."""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    inverse = tl.where(rows == columns, 1.0, 0.0)
    for number in range(1, SIZE):
        of_row = tl.sum(tl.where(rows == number, system, 0.0), 0)
        change = tl.sum(of_row[:, None] * inverse, 0)
        inverse = tl.where(rows == number, inverse - change[None, :], inverse)
    return inverse


@triton.jit
def _fading(totals, earlier, is_seen):
    """exp of differences [rows, columns], 0 where not seen: masked before exp, which would overflow."""
    return tl.exp(tl.where(is_seen, totals[:, None] - earlier[None, :], float("-inf")))


@triton.jit
def _load_share(b, is_row, stride, SIZE: tl.constexpr):
    """β [SIZE, 1]."""
    return tl.sigmoid(tl.load(b + tl.arange(0, SIZE) * stride, mask=is_row, other=0.0).to(tl.float32))[
        :, None
    ]


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def delta_solve_kernel(
    mixed, b, a, span_starts, shifts, sequences, numbers, decay, fade_bias, totals, solvers,
    b_stride, a_stride,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program (chunk, value head): the triangular system of what tokens write.

    totals: g, added up from the start of the chunk. solvers: the rows of the system's inverse [SIZE], which
    is 0 above the diagonal: of that half, not all is written. Half of the rows are solved at a time: the
    inverse of [[A, 0], [B, C]] is [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]].
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    NUM_HEADS: tl.constexpr = KEY_HEADS * GROUP
    NUM_CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEY_DIM + NUM_HEADS * VALUE_DIM
    HALF: tl.constexpr = SIZE // 2
    first, first_token, last_token = _chunk_of(chunk, sequences, numbers, span_starts, shifts, SIZE)
    is_low = _are_rows(first, first_token, last_token, HALF)
    is_high = _are_rows(first + HALF, first_token, last_token, HALF)
    order = tl.arange(0, HALF)
    a += first * a_stride + head
    low_fade = _log_fade(tl.load(a + order * a_stride, mask=is_low, other=0.0), fade_bias, decay, head)
    low_fade = tl.where(is_low, low_fade, 0.0)
    a += HALF * a_stride
    high_fade = _log_fade(tl.load(a + order * a_stride, mask=is_high, other=0.0), fade_bias, decay, head)
    low_total = tl.cumsum(low_fade, 0)
    high_total = tl.sum(low_fade, 0) + tl.cumsum(tl.where(is_high, high_fade, 0.0), 0)
    totals += first * NUM_HEADS + head
    tl.store(totals + order * NUM_HEADS, low_total, mask=is_low)
    tl.store(totals + (HALF + order) * NUM_HEADS, high_total, mask=is_high)
    b += first * b_stride + head
    low_share = _load_share(b, is_low, b_stride, HALF)
    high_share = _load_share(b + HALF * b_stride, is_high, b_stride, HALF)
    k = mixed + first * NUM_CHANNELS + (KEY_HEADS + head // GROUP) * KEY_DIM
    upper = tl.zeros([HALF, HALF], tl.float32)
    corner = tl.zeros([HALF, HALF], tl.float32)
    lower = tl.zeros([HALF, HALF], tl.float32)
    # A few keys at a time: all of them would take too many registers.
    for start in range(0, KEY_PADDED, MIN_DOT):
        keys = start + tl.arange(0, MIN_DOT)
        low = _load_rows(k, is_low, NUM_CHANNELS, keys, keys < KEY_DIM, HALF)
        high = _load_rows(k + HALF * NUM_CHANNELS, is_high, NUM_CHANNELS, keys, keys < KEY_DIM, HALF)
        upper = tl.dot(low, tl.trans(low), acc=upper, input_precision="ieee")
        corner = tl.dot(high, tl.trans(low), acc=corner, input_precision="ieee")
        lower = tl.dot(high, tl.trans(high), acc=lower, input_precision="ieee")
    is_earlier = order[:, None] > order[None, :]
    upper = upper * low_share * _fading(low_total, low_total, is_earlier)
    lower = lower * high_share * _fading(high_total, high_total, is_earlier)
    corner = corner * high_share * _fading(high_total, low_total, is_high[:, None] & is_low[None, :])
    upper = _invert(upper, HALF)
    lower = _invert(lower, HALF)
    corner = tl.dot(corner, upper, input_precision="ieee")
    corner = -tl.dot(lower, corner, input_precision="ieee")
    solvers += (first * NUM_HEADS + head) * SIZE
    stride, is_column = NUM_HEADS * SIZE, order < HALF
    _store_rows(solvers, upper, is_low, stride, order, is_column, HALF)
    solvers += HALF * stride
    _store_rows(solvers, corner, is_high, stride, order, is_column, HALF)
    _store_rows(solvers + HALF, lower, is_high, stride, order, is_column, HALF)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def delta_write_kernel(
    mixed, b, span_starts, shifts, sequences, numbers, totals, solvers, writes, asks, b_stride,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program (chunk, value head): the solution of the system.

    writes: what tokens would write if the state were empty. asks: what the state is asked by writes.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    NUM_HEADS: tl.constexpr = KEY_HEADS * GROUP
    NUM_CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEY_DIM + NUM_HEADS * VALUE_DIM
    first, first_token, last_token = _chunk_of(chunk, sequences, numbers, span_starts, shifts, SIZE)
    is_row = _are_rows(first, first_token, last_token, SIZE)
    order, keys, values = tl.arange(0, SIZE), tl.arange(0, KEY_PADDED), tl.arange(0, VALUE_PADDED)
    is_key, is_value = keys < KEY_DIM, values < VALUE_DIM
    of_head = first * NUM_HEADS + head
    places = of_head * SIZE + order[:, None] * NUM_HEADS * SIZE + order[None, :]
    is_there = is_row[:, None] & (order[:, None] >= order[None, :])
    solver = tl.load(solvers + places, mask=is_there, other=0.0)
    share = _load_share(b + first * b_stride + head, is_row, b_stride, SIZE)
    v = mixed + first * NUM_CHANNELS + 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM
    v = _load_rows(v, is_row, NUM_CHANNELS, values, is_value, SIZE)
    found = tl.dot(solver, (v.to(tl.float32) * share).to(v.dtype), input_precision="ieee")
    stride = NUM_HEADS * VALUE_DIM
    _store_rows(writes + of_head * VALUE_DIM, found, is_row, stride, values, is_value, SIZE)
    total = tl.load(totals + of_head + order * NUM_HEADS, mask=is_row, other=0.0)
    k = mixed + first * NUM_CHANNELS + (KEY_HEADS + head // GROUP) * KEY_DIM
    k = _load_rows(k, is_row, NUM_CHANNELS, keys, is_key, SIZE)
    wide = k.to(tl.float32) * share * tl.exp(total)[:, None]
    found = tl.dot(solver, wide.to(k.dtype), input_precision="ieee")
    _store_rows(asks + of_head * KEY_DIM, found, is_row, NUM_HEADS * KEY_DIM, keys, is_key, SIZE)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def delta_recur_kernel(
    mixed, slots, span_starts, shifts, memory, totals, writes, asks, answers, memory_stride,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program (sequence, value head, block of values): the chunks one after the other, with the
    block's part of the state on the chip.

    `writes` become what tokens write into the state; `answers` are the state's to the queries.
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    NUM_HEADS: tl.constexpr = KEY_HEADS * GROUP
    NUM_CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEY_DIM + NUM_HEADS * VALUE_DIM
    keys, values = tl.arange(0, KEY_PADDED), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_key, is_value = keys < KEY_DIM, values < VALUE_DIM
    memory += tl.load(slots + sequence).to(tl.int64) * memory_stride + head * KEY_DIM * VALUE_DIM
    state = _load_rows(memory, is_key, VALUE_DIM, values, is_value, KEY_PADDED)
    start, count = _span_of(sequence, span_starts)
    shift = tl.load(shifts + sequence).to(tl.int32)
    order = tl.arange(0, SIZE)
    of_queries = mixed + head // GROUP * KEY_DIM
    for number in range(tl.cdiv(shift + count, SIZE)):
        first_row = number * SIZE - shift
        is_row = (first_row + order >= 0) & (first_row + order < count)
        first = (start + first_row).to(tl.int64)
        of_head = first * NUM_HEADS + head
        ask = _load_rows(asks + of_head * KEY_DIM, is_row, NUM_HEADS * KEY_DIM, keys, is_key, SIZE)
        q = _load_rows(of_queries + first * NUM_CHANNELS, is_row, NUM_CHANNELS, keys, is_key, SIZE)
        of_keys = of_queries + KEY_HEADS * KEY_DIM + first * NUM_CHANNELS
        k = _load_rows(of_keys, is_row, NUM_CHANNELS, keys, is_key, SIZE)
        total = tl.load(totals + of_head + order * NUM_HEADS, mask=is_row, other=0.0)
        last_row = tl.minimum(count - first_row, SIZE) - 1
        last = tl.load(totals + of_head + last_row * NUM_HEADS)
        of_writes, stride = of_head * VALUE_DIM, NUM_HEADS * VALUE_DIM
        write = _load_rows(writes + of_writes, is_row, stride, values, is_value, SIZE)
        narrow = state.to(write.dtype)
        answer = tl.dot(q, narrow, input_precision="ieee") * tl.exp(total)[:, None]
        _store_rows(answers + of_writes, answer, is_row, stride, values, is_value, SIZE)
        wide = write.to(tl.float32) - tl.dot(ask, narrow, input_precision="ieee")
        _store_rows(writes + of_writes, wide, is_row, stride, values, is_value, SIZE)
        # Rows that are no tokens write 0; their total of 0 makes a factor of at most 1.
        wide = wide * tl.exp(last - total)[:, None]
        state = state * tl.exp(last)
        state += tl.dot(tl.trans(k), wide.to(write.dtype), input_precision="ieee")
    _store_rows(memory, state, is_key, VALUE_DIM, values, is_value, KEY_PADDED)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def delta_output_kernel(
    mixed, z, span_starts, shifts, sequences, numbers, totals, writes, answers, gain, out, eps,
    z_stride, out_stride,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY_DIM: tl.constexpr, KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program (chunk, value head): the state's answers with the chunk's own writes, and the
    norm with a gate."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    NUM_HEADS: tl.constexpr = KEY_HEADS * GROUP
    NUM_CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEY_DIM + NUM_HEADS * VALUE_DIM
    first, first_token, last_token = _chunk_of(chunk, sequences, numbers, span_starts, shifts, SIZE)
    is_row = _are_rows(first, first_token, last_token, SIZE)
    order, keys, values = tl.arange(0, SIZE), tl.arange(0, KEY_PADDED), tl.arange(0, VALUE_PADDED)
    is_key, is_value = keys < KEY_DIM, values < VALUE_DIM
    of_queries = mixed + first * NUM_CHANNELS + head // GROUP * KEY_DIM
    q = _load_rows(of_queries, is_row, NUM_CHANNELS, keys, is_key, SIZE)
    k = _load_rows(of_queries + KEY_HEADS * KEY_DIM, is_row, NUM_CHANNELS, keys, is_key, SIZE)
    of_head = first * NUM_HEADS + head
    total = tl.load(totals + of_head + order * NUM_HEADS, mask=is_row, other=0.0)
    is_seen = (order[:, None] >= order[None, :]) & is_row[:, None] & is_row[None, :]
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * _fading(total, total, is_seen)
    of_writes, stride = of_head * VALUE_DIM, NUM_HEADS * VALUE_DIM
    write = _load_rows(writes + of_writes, is_row, stride, values, is_value, SIZE)
    found = tl.dot(scores.to(write.dtype), write, input_precision="ieee")
    found += _load_rows(answers + of_writes, is_row, stride, values, is_value, SIZE)
    z += first * z_stride + head * VALUE_DIM
    gates = _load_rows(z, is_row, z_stride, values, is_value, SIZE)
    gated = _gated(found, gates, tl.load(gain + values, mask=is_value, other=0.0), eps, VALUE_DIM)
    out += first * out_stride + head * VALUE_DIM
    _store_rows(out, gated, is_row, out_stride, values, is_value, SIZE)
