"""Sliding-tile attention: a query sees the tokens of a window of tiles around its own tile, and text.

arXiv:2502.04507; the sliding branch of VORTA, arXiv:2505.18809 (v2). For tiles q and k of video tokens

    attend(q, k) = AND_a |c_a - k_a| <= win_a//2,      c_a = clip(q_a, win_a//2, n_a - 1 - win_a//2)

Every video query also sees all valid text keys; a valid text query sees all valid keys; a padded one gives 0.

`sliding_reference` masks all pairs, for small sizes. `sliding_groups` is the same without a mask: tiles with
one centre see one box of tiles, so each window is a dense rectangle of queries and keys, in a few classes of
equal size (video_grid.py). HunyuanVideo at 720p has 250 tiles and 72 windows. The keys of a window are
gathered, so that a key is copied as often as windows hold it (7.8 times there): callers bound the memory by
the number of heads they give at once. Where no library takes the rectangles, XLA holds their logits, 32 of 1728
queries and 11,920 keys at once: its own account for a CPU is 9.8 GB of temporaries for one head there, 33.6 GB for
four. Differentiable; the gradient of the gathers adds.

`sliding` chooses between them and two kernels that read windows in place. Until a kernel's correctness has been
recorded on its device it is experimental, and taken only by name.

Rows are places of the layout of video_grid.py, then text slots; `text` says how many of these are valid.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrepro.config import UserError
from jaxrepro.ops import checks
from jaxrepro.ops.attention import attend, attend_joint, attend_prefix, hide_padding
from jaxrepro.ops.video_grid import VideoGrid, rectangles
from jaxrepro.ops.video_places import counted, in_program


def sliding_reference(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
) -> Float[Array, "b s h i"]:
    """Sliding-tile attention by its definition, with a mask over all pairs."""
    checks.attention(q, k, v, grid.length, text)
    b, s = q.shape[:2]
    n = grid.length
    text = jnp.full(b, s - n) if text is None else text
    valid = jnp.arange(s) < (n + text)[:, None]
    see = np.ones((s, s), bool)
    see[:n, :n] = window_mask(grid)
    o, _ = attend(q, k, v, see[None, None] & valid[:, None, None])
    return hide_padding(o, n, text)


def window_mask(grid: VideoGrid) -> np.ndarray:
    """(S, S) whether the query at a place of the layout sees the key at another."""
    at = np.stack(np.unravel_index(grid.order, grid.size)) // np.reshape(grid.tile, (3, 1))
    see = np.ones((grid.length, grid.length), bool)
    for tile, centre, window in zip(at, grid.centres(), grid.window):
        see &= abs(centre[tile][:, None] - tile) <= window // 2
    return see


def sliding_groups(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
) -> Float[Array, "b s h i"]:
    """Sliding-tile attention as dense attention of one rectangle a window."""
    checks.attention(q, k, v, grid.length, text)
    b, s, h, i = q.shape
    slots = s - grid.length
    classes, back = rectangles(grid, slots)
    computed = lambda table: in_program(table, lambda: counted(table))
    gather = lambda x, index: jnp.take(x, index.ravel(), axis=1, mode="clip").reshape(
        -1, index.shape[1], h, i
    )
    rows = []
    for c in classes:
        lengths, queries, keys = _lengths(c, b, slots, text), computed(c.queries), computed(c.keys)
        o = attend_prefix(gather(q, queries), gather(k, keys), gather(v, keys), lengths)
        rows.append(o.reshape(b, -1, h, i))
    o = jnp.take(jnp.concatenate(rows, axis=1), computed(back), axis=1, mode="clip")
    if not slots:
        return o
    return jnp.concatenate([o, attend_joint(q[:, grid.length :], k, v, grid.length, text)], axis=1)


def _lengths(c, b, slots, text):
    """(b g) valid keys of every rectangle; None where all of all are valid."""
    if text is None and (c.lengths + slots == c.keys.shape[1]).all():
        return None
    text = jnp.full(b, slots) if text is None else text
    return (text[:, None] + c.lengths).ravel()


def with_groups(
    kernel: Callable[[Array, Array, Array, Array], Array],
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    text: Int[Array, "b"] | None,
) -> Float[Array, "b s h i"]:
    """Sliding-tile attention whose video rows are kernel(q, k, v, valid text), which has no gradient of its own.

    Text rows are dense attention; the gradient is that of the window groups, which compute the output again.
    """
    n = grid.length
    checks.attention(q, k, v, n, text)

    @jax.custom_vjp
    def video(q, k, v, valid):
        return kernel(q, k, v, valid)

    def forward(*arguments):
        return video(*arguments), arguments

    def backward(arguments, slope):
        *qkv, valid = arguments
        groups = lambda q, k, v: sliding_groups(q, k, v, grid, text=valid)[:, :n]
        return *jax.vjp(groups, *qkv)[1](slope), None

    video.defvjp(forward, backward)
    valid = jnp.full(len(q), q.shape[1] - n) if text is None else text
    o = video(q, k, v, valid.astype(jnp.int32))
    if q.shape[1] == n:
        return o
    return jnp.concatenate([o, attend_joint(q[:, n:], k, v, n, text)], axis=1)


KERNELS = ("auto", "groups", "reference", "mosaic", "tpu")


def sliding(
    q: Float[Array, "b s h i"],
    k: Float[Array, "b s h i"],
    v: Float[Array, "b s h i"],
    grid: VideoGrid,
    *,
    text: Int[Array, "b"] | None = None,
    kernel: str = "auto",
) -> Float[Array, "b s h i"]:
    """Sliding-tile attention by the kernel of that name; "auto" is the window groups on every device.

    "mosaic" (Hopper GPUs) and "tpu" are experimental: neither has run on its device. UserError where a kernel
    cannot run.
    """
    checks.attention(q, k, v, grid.length, text)
    return by_kernel(kernel)(q, k, v, grid, text=text)


@lru_cache(maxsize=len(KERNELS))
def by_kernel(kernel: str) -> Callable[..., Array]:
    """The function f(q, k, v, grid, *, text) of a kernel; the same object each time. UserError where it cannot run."""
    if kernel not in KERNELS:
        raise UserError(f"kernel={kernel!r} must be one of {', '.join(KERNELS)}")
    if kernel in ("auto", "groups"):
        return sliding_groups
    return sliding_reference if kernel == "reference" else _experimental(kernel)


def has_hopper() -> bool:
    """Whether the first device of this process is one of those that the kernel "mosaic" is for."""
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", "none"))
    return device.platform == "gpu" and capability.startswith("9.")


def _experimental(kernel):
    """A kernel, imported late: Pallas takes a second, and older versions of jax lack parts of it."""
    device = jax.local_devices()[0]
    try:
        if kernel == "tpu":
            if device.platform != "tpu":
                raise UserError(
                    f"kernel='tpu' needs a TPU, not {device.platform}; take kernel='auto'"
                )
            from jaxrepro.ops.sliding_tpu import sliding_tpu

            return sliding_tpu
        if not has_hopper():
            capability = getattr(device, "compute_capability", "none")
            raise UserError(
                f"kernel='mosaic' needs a GPU of compute capability 9.x, not {device.device_kind} ({capability}); "
                "take kernel='auto'"
            )
        from jaxrepro.ops.sliding_mosaic import sliding_mosaic
    except (ImportError, AttributeError) as e:
        raise UserError(
            f"kernel={kernel!r} needs jax 0.10.2 or newer ({e}); take kernel='auto'"
        ) from e
    return sliding_mosaic
