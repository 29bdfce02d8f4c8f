"""Where every array lives: one mesh of four axes, and rules from logical axis names to mesh axes.

The mesh is `(data, fsdp, sequence, tensor)`; any axis may be 1. A tensor's declaration names its
axes ("embed", "heads", ...); a rule table per mode turns the names into a PartitionSpec. Axes are
of type Auto, so a sharding never changes what a program computes, only where it does so.

    logical axis     train             decode
    batch            (data, fsdp)      (data, fsdp)
    seq              sequence          -
    embed            fsdp              -
    heads, mlp       tensor            tensor            must divide
    vocab            tensor            tensor
    kv_heads         tensor, or replicated where it does not divide
    anything else    replicated

With `sequence` > 1 XLA gathers keys and values over that axis: exact and simple; a ring is faster.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrepro.config import UserError

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = ("data", "fsdp")
_DATA = (("batch", BATCH), ("pages", ()))
_WEIGHTS = (("heads", ("tensor",)), ("kv_heads", ("tensor",)), ("mlp", ("tensor",)))
_TABLE = (("vocab", ("tensor",)),)
_NOWHERE = tuple((name, ()) for name in ("act_embed", "layers", "head_dim", "norm"))
RULES = {
    "train": (*_DATA, ("seq", ("sequence",)), ("embed", ("fsdp",)), *_WEIGHTS, *_TABLE, *_NOWHERE),
    "decode": (*_DATA, ("seq", ()), ("embed", ()), *_WEIGHTS, *_TABLE, *_NOWHERE),
}
MUST_DIVIDE = {"heads": "attention heads", "mlp": "width of the feed-forward layer"}
QUIET = {"kv_heads"}  # replicated by design where it does not divide
_logged: set[tuple] = set()


def _sizes(shape) -> tuple[int, int, int, int]:
    """(data, fsdp, sequence, tensor) of a mapping, a config or a tuple; absent axes are 1."""
    if isinstance(shape, Sequence):
        if len(shape) != len(AXES):
            raise UserError(f"mesh={tuple(shape)} has {len(shape)} axes; give four: {AXES}")
        return tuple(int(n) for n in shape)
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise UserError(f"mesh axis {unknown[0]!r} is unknown; the axes are {', '.join(AXES)}")
    return tuple(int(shape.get(axis, 1)) for axis in AXES)


def mesh_sizes(shape, devices: int) -> tuple[int, int, int, int]:
    """Sizes of the four axes on `devices` devices; one -1 takes what the others leave."""
    sizes = _sizes(shape)
    text = " x ".join(str(n) for n in sizes) + " (" + ", ".join(AXES) + ")"
    if any(n < 1 and n != -1 for n in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {text}: each axis is at least 1, and -1 (the rest) at most once")
    if -1 in sizes:
        known = -math.prod(sizes)
        if devices % known:
            raise UserError(
                f"mesh {text} needs a multiple of {known} devices, there are {devices}; "
                f"choose axes whose product divides {devices}"
            )
        sizes = tuple(devices // known if n == -1 else n for n in sizes)
    if math.prod(sizes) not in (1, devices):
        raise UserError(
            f"mesh {text} takes {math.prod(sizes)} devices, there are {devices}; "
            f"set one axis of --config.mesh to -1 (the rest), or all to 1 (the first device)"
        )
    return sizes


def make_mesh(shape=(1, 1, 1, 1), *, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, sequence, tensor) over `devices` (default: all).

    `shape` is a mapping or config by axis name, or four sizes; one -1 is "the rest". All ones is the
    first device alone; any other product must be the number of devices (UserError).
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(shape, len(devices))
    if math.prod(sizes) == 1:
        if jax.process_count() > 1 and len(devices) > 1:
            raise UserError("a mesh of one device in a run of several processes; set an axis to -1")
        devices = devices[:1]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def row_parts(mesh) -> int:
    """The number of parts in which the rows of a batch lie on the mesh: data * fsdp."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batches(mesh, **batches: int) -> None:
    """UserError unless every batch, given under its config name, divides over data * fsdp."""
    parts = row_parts(mesh)
    for name, size in batches.items():
        if size % parts:
            raise UserError(
                f"{name}={size} does not divide over data * fsdp = {parts} of the mesh; use a "
                f"multiple of {parts}"
            )


def mesh_here(shape, devices: int) -> tuple[int, int, int, int]:
    """`shape` where it fits `devices`, else all of them on fsdp: what a run trained on other hardware
    is evaluated on."""
    sizes = _sizes(shape)
    fits = -1 in sizes or math.prod(sizes) in (1, devices)
    return sizes if fits else (1, devices, 1, 1)


def abstract_mesh(shape, *, devices: int | None = None) -> AbstractMesh:
    """A mesh without hardware, for shapes and memory of a size that is not here.

    Where `shape` has a -1, `devices` says how many there are (default 1).
    """
    sizes = _sizes(shape)
    if devices is None:
        devices = abs(math.prod(sizes))
    sizes = mesh_sizes(sizes, devices)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_for(axes, shape, mesh, mode: str = "train") -> P:
    """PartitionSpec of one array from the logical names of its axes (None = replicated).

    Mesh axes of size 1 are left out. Raises ValueError for an unknown name and where two axes of
    the array claim one mesh axis; UserError where heads or mlp do not divide by `tensor`.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {tuple(axes)} name {len(axes)} dimensions of shape {tuple(shape)}")
    used: set[str] = set()
    entries = []
    for name, size in zip(axes, shape):
        entries.append(None if name is None else _place(name, size, mesh, mode, used, axes))
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def _place(name, size, mesh, mode, used, axes):
    candidates = [places for key, places in RULES[mode] if key == name]
    if not candidates:
        raise ValueError(f"logical axis {name!r} of {tuple(axes)} has no rule for {mode!r}")
    free = [places for places in candidates if not used & set(places)]
    if not free:
        raise ValueError(f"axes {tuple(axes)}: {name!r} clashes with an axis on {candidates[0]}")
    used.update(free[0])
    places = tuple(axis for axis in free[0] if mesh.shape[axis] > 1)
    parts = math.prod(mesh.shape[axis] for axis in places)
    if size % parts == 0:
        return None if not places else places[0] if len(places) == 1 else places
    if name in MUST_DIVIDE:
        raise UserError(
            f"mesh.tensor={parts} does not divide the {MUST_DIVIDE[name]} ({size}); "
            f"use a divisor of {size} for mesh.tensor"
        )
    if name not in QUIET and (name, size, parts) not in _logged:
        _logged.add((name, size, parts))
        logging.getLogger(__name__).info(
            "%s of size %d does not divide by %s=%d: replicated", name, size, places, parts
        )
    return None


def _is_axes(x) -> bool:
    return hasattr(x, "axes") or (
        isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)
    )


def path_of(keys) -> str:
    """A key path of jax.tree_util as "text/layers/wq"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def shard_tree(axes_tree, abstract_tree, mesh, mode: str = "train", overrides=()):
    """Tree of NamedSharding for a tree of arrays or shapes.

    `axes_tree` has, for each leaf, a tuple of logical names or an object with `.axes`. `overrides`
    maps a regular expression on the leaf's path ("text/embed.*") to a PartitionSpec or a tuple of
    mesh axes; the first that matches wins. UserError for one that matches nothing or does not fit.
    """
    overrides = tuple(overrides.items() if isinstance(overrides, Mapping) else overrides)
    matched = set()

    def one(keys, axes, x):
        path = path_of(keys)
        for pattern, spec in overrides:
            if re.fullmatch(pattern, path):
                matched.add(pattern)
                return NamedSharding(mesh, _checked(P(*spec), x.shape, mesh, path))
        return NamedSharding(mesh, spec_for(getattr(axes, "axes", axes), x.shape, mesh, mode))

    tree = jax.tree_util.tree_map_with_path(one, axes_tree, abstract_tree, is_leaf=_is_axes)
    for pattern, _ in overrides:
        if pattern not in matched:
            raise UserError(f"sharding override {pattern!r} matches no parameter; see --dry_run")
    return tree


def _checked(spec: P, shape, mesh, path: str) -> P:
    if len(spec) > len(shape):
        raise UserError(f"sharding override of {path}: {spec} is longer than shape {shape}")
    for size, places in zip(shape, spec):
        for axis in (places,) if isinstance(places, str) else places or ():
            if axis not in AXES:
                raise UserError(f"sharding override of {path}: no mesh axis {axis!r} in {AXES}")
            if size % mesh.shape[axis]:
                raise UserError(
                    f"sharding override of {path}: {axis}={mesh.shape[axis]} does not divide {size}"
                )
    return spec


def replicated(mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def like_params(tree, params_shardings, mesh):
    """Shardings for a tree that contains copies of the parameters (moments, averages, a state).

    A leaf whose path ends in a parameter's whole path takes that parameter's sharding if its rank
    allows; everything else is replicated. Moments of optax, `State.params` and references match.
    """
    known = {
        path_of(keys): sharding
        for keys, sharding in jax.tree_util.tree_leaves_with_path(params_shardings)
    }

    def one(keys, x):
        for start in range(len(keys)):
            sharding = known.get(path_of(keys[start:]))
            if sharding is not None and len(sharding.spec) <= len(x.shape):
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh, batch=None):
    """Sharding of a batch: the leading axis over (data, fsdp); scalars replicated.

    Without `batch`: one NamedSharding for every leaf. With a batch (arrays or shapes): a tree, in
    which leaves of rank >= 2 also lie on `sequence` along their longest later axis that divides.
    UserError where the number of rows does not divide by data * fsdp.
    """
    rows = tuple(axis for axis in BATCH if mesh.shape[axis] > 1) or None
    if batch is None:
        return NamedSharding(mesh, P(rows))
    parts = row_parts(mesh)
    n = mesh.shape["sequence"]

    def one(keys, x):
        if not x.shape:
            return replicated(mesh)
        if x.shape[0] % parts:
            raise UserError(
                f"a batch of {x.shape[0]} rows ({path_of(keys)}) does not divide over data * fsdp = "
                f"{parts}; use a multiple of {parts}"
            )
        entries: list[Any] = [rows] + [None] * (len(x.shape) - 1)
        fits = [axis for axis in range(1, len(x.shape)) if n > 1 and x.shape[axis] % n == 0]
        if fits:
            entries[max(fits, key=lambda axis: x.shape[axis])] = "sequence"
        return NamedSharding(mesh, P(*entries))

    return jax.tree_util.tree_map_with_path(one, batch)


def place(tree, shardings):
    """Put host or device arrays where `shardings` (one, or a tree that begins as `tree` does) says.

    In a run of several processes each has the whole host arrays, equal everywhere, and puts down the
    parts of its own devices; nothing travels.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda x: _place_parts(x, sharding), part),
        shardings,
        tree,
        is_leaf=lambda x: x is None,
    )


def _place_parts(x, sharding):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jax.dtypes.issubdtype(getattr(x, "dtype", np.float32), jax.dtypes.prng_key):
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(tree):
    """Host copies of whole arrays; in a run of several processes every one of them must call."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    leaves, structure = jax.tree.flatten(tree)
    parts = [i for i, x in enumerate(leaves) if not _whole(x)]
    at = [leaves[i].sharding.update(spec=P()) for i in parts]
    gathered = jax.jit(lambda x: x, out_shardings=at)([leaves[i] for i in parts])
    for i, x in zip(parts, gathered):
        leaves[i] = x
    return jax.tree.unflatten(structure, [np.asarray(x) for x in leaves])


def _whole(x) -> bool:
    """Whether this process holds all of a leaf."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def constrain(x, *axes: str | None, mode: str = "train"):
    """Pin an activation to the mesh by logical names; without a mesh (`jax.set_mesh`) returns x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec_for(axes, x.shape, mesh, mode))


def on_mesh(mesh, function):
    """`function`, called with the mesh in force: what it traces is pinned there, for decode by its rules."""
    if mesh.size == 1:
        return function

    def call(*args):
        with jax.set_mesh(mesh):
            return function(*args)

    return call


def parts_of(rows: int) -> int:
    """The number of parts in which the mesh in force (`jax.set_mesh`) splits this many rows."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = row_parts(mesh) if set(BATCH) <= set(mesh.axis_names) else 1
    return parts if rows % parts == 0 else 1


def splits_tokens() -> bool:
    """Whether the mesh in force (`jax.set_mesh`) splits the token axis of activations."""
    mesh = jax.sharding.get_abstract_mesh()
    return "sequence" in mesh.axis_names and mesh.shape["sequence"] > 1
