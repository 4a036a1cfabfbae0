"""The kernel of `ops.selected_attention.triton`; imports triton, so that it is imported when first launched."""

import triton
import triton.language as tl


@triton.jit
def attend(
    query,
    key,
    value,
    index,
    allowed,
    bias,
    cos,
    sin,
    out,
    query_step,
    key_step,
    value_step,
    index_step,
    allowed_step,
    bias_step,
    cos_step,
    sin_step,
    out_step,
    scale,
    softcap,
    kv_heads,
    each,
    runs,
    length,
    chosen,
    turned,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ASKED: tl.constexpr,
    READ: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program: ASKED of the each*length queries of one row, key head and run, over its chosen keys, READ at a time.

    Steps are strides; group and query axes that are shared have stride 0. turned: how much of DIM is turned.
    WIDEN: tiles are multiplied in fp32, for triton's interpreter, which multiplies the bits of bf16.
    """
    blocks = tl.cdiv(each * length, ASKED)
    program = tl.program_id(0)
    run = (program // blocks % runs).to(tl.int64)
    kv = (program // blocks // runs % kv_heads).to(tl.int64)
    row = (program // blocks // runs // kv_heads).to(tl.int64)
    asked = program % blocks * ASKED + tl.arange(0, ASKED)
    real = asked < each * length
    place = (asked // each).to(tl.int64)
    head = kv * each + asked % each
    slots = tl.arange(0, READ)
    dim = tl.arange(0, WIDTH)
    value_dim = tl.arange(0, VALUE_WIDTH)

    query += row * query_step[0] + run * query_step[2]
    key += row * key_step[0] + kv * key_step[1]
    value += row * value_step[0] + kv * value_step[1]
    index += row * index_step[0] + kv * index_step[1] + run * index_step[2]
    allowed += row * allowed_step[0] + kv * allowed_step[1] + run * allowed_step[2]
    if bias is not None:
        bias += row * bias_step[0] + kv * bias_step[1] + run * bias_step[2]
    own = head * query_step[1] + place * query_step[3]
    asks = tl.load(
        query + own[:, None] + dim[None, :] * query_step[4], mask=real[:, None] & (dim < DIM)[None, :], other=0
    )

    if WIDEN:
        asks = asks.to(tl.float32)

    most = tl.full([ASKED], -float("inf"), tl.float32)
    total = tl.zeros([ASKED], tl.float32)
    mixed = tl.zeros([ASKED, VALUE_WIDTH], tl.float32)
    for start in range(0, chosen, READ):
        slot = start + slots
        inside = real[:, None] & (slot < chosen)[None, :]
        seen = allowed + place[:, None] * allowed_step[3] + slot[None, :] * allowed_step[4]
        reads = tl.load(seen, mask=inside, other=0) != 0
        wanted = tl.max(reads.to(tl.int32), 0) > 0  # nothing is loaded of a key that none of the queries reads
        column = tl.load(index + slot * index_step[3], mask=wanted, other=0).to(tl.int64)
        at = key + column[:, None] * key_step[2]
        loads = wanted[:, None] & (dim < DIM)[None, :]
        keys = tl.load(at + dim[None, :] * key_step[3], mask=loads, other=0)
        if cos is not None:
            turns = wanted[:, None] & (dim < turned)[None, :]
            first = dim < turned // 2
            partner = tl.where(first, dim + turned // 2, dim - turned // 2)
            others = tl.load(at + partner[None, :] * key_step[3], mask=turns, other=0).to(tl.float32)
            others = tl.where(first[None, :], -others, others)
            along = tl.load(cos + slot[:, None] * cos_step[0] + dim[None, :] * cos_step[1], mask=turns, other=1)
            across = tl.load(sin + slot[:, None] * sin_step[0] + dim[None, :] * sin_step[1], mask=turns, other=0)
            keys = (keys.to(tl.float32) * along.to(tl.float32) + others * across.to(tl.float32)).to(keys.dtype)
        if WIDEN:
            keys = keys.to(tl.float32)
        scores = tl.dot(asks, tl.trans(keys), input_precision="ieee") * scale
        if softcap is not None:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
        if bias is not None:
            added = bias + place[:, None] * bias_step[3] + slot[None, :] * bias_step[4]
            scores += tl.load(added, mask=reads, other=0).to(tl.float32)
        scores = tl.where(reads, scores, -float("inf"))

        top = tl.maximum(most, tl.max(scores, 1))
        level = tl.where(top == -float("inf"), 0.0, top)  # while nothing was read
        law = tl.exp(scores - level[:, None])
        kept = tl.exp(most - level)
        values = tl.load(
            value + column[:, None] * value_step[2] + value_dim[None, :] * value_step[3],
            mask=wanted[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0,
        )
        if WIDEN:
            values = values.to(tl.float32)
        mixed = tl.dot(law.to(values.dtype), values, mixed * kept[:, None], input_precision="ieee")
        total = total * kept + tl.sum(law, 1)
        most = top

    mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
    own = row * out_step[0] + run * out_step[2] + head * out_step[1] + place * out_step[3]
    tl.store(
        out + own[:, None] + value_dim[None, :] * out_step[4],
        mixed.to(out.dtype.element_ty),
        mask=real[:, None] & (value_dim < VALUE_DIM)[None, :],
    )
