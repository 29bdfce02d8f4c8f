"""Attention, the XLA reference: grouped queries, any boolean mask, softmax in float32.

    lse = log sum_s exp(q k_s / sqrt(i)),    o = sum_s exp(q k_s / sqrt(i) - lse) v_s

Two disjoint sets of keys combine exactly by their log-sum-exp, so tokens that many rows share (a
prompt and its n completions) are stored and read once:

    o = sigmoid(lse_1 - lse_2) o_1 + sigmoid(lse_2 - lse_1) o_2

`attend_prefix` is attention without causality, between rectangles of any two lengths, whose keys are valid up
to a length: the kind that cuDNN and other libraries compute without ever holding a mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrepro.ops.dense import einsum32

LANES = 128  # of a vector register of a TPU
MASKED = -1e30  # finite, so that a row without any key gives zeros and not NaN


def attend(
    q: Float[Array, "b t h i"],
    k: Float[Array, "b s k i"],
    v: Float[Array, "b s k i"],
    mask: Bool[Array, "#b #1 #t s"],
) -> tuple[Float[Array, "b t h i"], Float[Array, "b t h"]]:
    """Attention output and its log-sum-exp (float32); query head j reads kv head j // (h / k).

    A query whose mask is False everywhere gets o = 0 and lse = MASKED.
    """
    return attend_packed(q, jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2), mask)


def attend_packed(
    q: Float[Array, "b t h i"],
    k: Float[Array, "b k i s"],
    v: Float[Array, "b k s i"],
    mask: Bool[Array, "#b #1 #t s"],
) -> tuple[Float[Array, "b t h i"], Float[Array, "b t h"]]:
    """`attend` on keys and values that lie as its two matrix products read them.

    A decode loop stores them so: one new query per row leaves nothing to amortise a transpose over.
    """
    b, t, h, i = q.shape
    kv = k.shape[1]
    g = h // kv
    grouped = q.reshape(b, t, kv, g, i).transpose(0, 2, 1, 3, 4).reshape(b, kv, t * g, i)
    scores = einsum32("bkqi,bkis->bkqs", grouped, k)
    keep = jnp.repeat(mask, g, axis=2) if mask.shape[2] > 1 else mask  # (b, 1, t g, s)
    scores = jnp.where(keep, scores * i**-0.5, MASKED)
    # a floor above MASKED, so that exp gives 0 where there is no key at all
    top = jax.lax.stop_gradient(jnp.clip(scores.max(-1, keepdims=True), min=MASKED / 2))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    o = jnp.einsum("bkqs,bksi->bkqi", weights.astype(v.dtype), v)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    o = (o / total).astype(q.dtype)
    lse = jnp.where(some, top + jnp.log(total), MASKED)
    back = lambda a: a.reshape(b, kv, t, g, -1).transpose(0, 2, 1, 3, 4).reshape(b, t, h, -1)
    return back(o), back(lse)[..., 0]


def merge(
    o_1: Float[Array, "*b i"],
    lse_1: Float[Array, "*b"],
    o_2: Float[Array, "*b i"],
    lse_2: Float[Array, "*b"],
) -> Float[Array, "*b i"]:
    """Attention over the union of two disjoint sets of keys, from the output and lse of each."""
    share = jax.nn.sigmoid(lse_1 - lse_2)[..., None]
    return (o_1 * share + o_2 * (1 - share)).astype(o_1.dtype)


def attend_prefix(
    q: Float[Array, "b t h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    length: Int[Array, "b"] | None = None,
) -> Float[Array, "b t h i"]:
    """Every query of row b attends to its first length[b] keys, at least one (None = all).

    cuDNN on an NVIDIA GPU, for half precision and head sizes that it takes; splash attention on a TPU, for heads of
    whole vector registers (lowered and interpreted; it has not run on one); XLA elsewhere.
    """
    if length is not None:
        length = length.astype(jnp.int32)
    arguments = (q, k, v) if length is None else (q, k, v, length)
    libraries = (
        {"cuda": _cudnn} if _cudnn_takes(q) else {"tpu": _splash} if _splash_takes(q, k) else {}
    )
    if libraries:
        return jax.lax.platform_dependent(*arguments, default=_xla, **libraries)
    return _xla(*arguments)


def _cudnn_takes(q):
    # jax looks for cuDNN while it traces, so without it the branch may not even be traced
    device = jax.local_devices()[0]
    if "cuda" not in getattr(device.client, "platform_version", "").lower():
        return False
    largest = 256 if float(getattr(device, "compute_capability", 0)) >= 9 else 128
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= largest


def _cudnn(q, k, v, length=None):
    # jax takes no odd lengths where there is a gradient
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
    if length is None and k.shape[1] % 2:
        length = jnp.full(len(k), k.shape[1], jnp.int32)
    o = jax.nn.dot_product_attention(
        even(q), even(k), even(v), key_value_seq_lengths=length, implementation="cudnn"
    )
    return o[:, : q.shape[1]]


def _splash_takes(q, k):
    # a block has at least 128 rows; fewer would be mostly padding
    long = min(q.shape[1], k.shape[1]) >= LANES
    return jax.local_devices()[0].platform == "tpu" and long and q.shape[-1] % LANES == 0


def _splash(q, k, v, length=None, *, interpret=False):
    # its mask is whole; padding, and keys past the length, are another segment
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    b, t, h, i = q.shape
    s = k.shape[1]
    rows, keys = (min(512, -(-n // LANES) * LANES) for n in (t, s))

    def heads_first(x, block):
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))), 1, 2)

    q, k, v = heads_first(q * i**-0.5, rows), heads_first(k, keys), heads_first(v, keys)
    run = kernel.make_splash_mha(
        mask.MultiHeadMask([mask.FullMask((q.shape[2], k.shape[2]))] * h),
        block_sizes=kernel.BlockSizes(
            block_q=rows,
            block_kv=keys,
            block_q_dkv=rows,
            block_kv_dkv=keys,
            block_q_dq=rows,
            block_kv_dq=keys,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if length is None and k.shape[2] == s:
        o = jax.vmap(run)(q, k, v)
    else:
        length = jnp.full(b, s) if length is None else length
        past = (jnp.arange(k.shape[2]) >= length[:, None]).astype(jnp.int32)
        o = jax.vmap(run)(q, k, v, kernel.SegmentIds(jnp.zeros((b, q.shape[2]), jnp.int32), past))
    return jnp.swapaxes(o, 1, 2)[:, :t]


def _xla(q, k, v, length=None):
    s = k.shape[1]
    mask = jnp.ones((1, 1, 1, s), bool)
    if length is not None:
        mask = jnp.arange(s) < length[:, None, None, None]
    return attend(q, k, v, mask)[0]


def attend_joint(
    q: Float[Array, "b t h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    video: int,
    text: Int[Array, "b"] | None = None,
) -> Float[Array, "b t h i"]:
    """Attention between all tokens of a row: `video` tokens, then text slots of which the first text[b] are valid.

    Queries may be fewer than keys: the last of them, text included. A padded text query gives 0. None: all
    text is valid.
    """
    if text is None:
        return attend_prefix(q, k, v)
    o = attend_prefix(q, k, v, video + text)
    first = k.shape[1] - q.shape[1]
    return hide_padding(o, video - first, text)


def hide_padding(
    o: Float[Array, "b t h i"], video: int, text: Int[Array, "b"]
) -> Float[Array, "b t h i"]:
    """o with zeros at text slots text[b] and on, which follow `video` rows."""
    valid = jnp.arange(o.shape[1]) < (video + text)[:, None]
    return jnp.where(valid[..., None, None], o, 0)
