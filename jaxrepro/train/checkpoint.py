"""Checkpoints of a run: the only file that knows orbax.

    <workdir>/checkpoints/<stage>/<step>/{params, rest, meta}

`params` lies apart, so that evaluation and `init_from` read it without the optimiser. `meta` is
JSON: format version, stage, step, n (steps the stage was asked for), done (ended early), best, and
shape and dtype of every leaf, so that a checkpoint of another model is named as such. A folder with
a number for a name is complete: orbax renames it into place. Saving goes on in the background;
`wait` or `close` before leaving, or the last one is lost.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrepro import distributed
from jaxrepro.config import UserError
from jaxrepro.files import read_json, write_json, writing
from jaxrepro.sharding import make_mesh, path_of, replicated
from jaxrepro.train.state import State

FORMAT = 1
FOLDER = "checkpoints"
BEST = "-best"


def _not_orbax(record) -> bool:
    return "orbax" not in record.pathname


def leaves_of(tree) -> dict[str, str]:
    """Path -> "float32[4,8]" of every leaf of a tree of arrays or shapes."""
    return {
        path_of(keys): f"{x.dtype}[{','.join(map(str, x.shape))}]"
        for keys, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _rest(state: State) -> dict[str, Any]:
    return {"step": state.step, "opt": state.opt, "extra": state.extra}


def _savable(tree, name: str):
    """Numpy scalars as 0-d arrays (orbax saves them but cannot restore them); no empty arrays."""

    def one(keys, x):
        x = np.asarray(x) if isinstance(x, np.generic) else x
        if not hasattr(x, "shape") or 0 in x.shape:
            raise ValueError(
                f"{name}/{path_of(keys)}: checkpoints hold arrays with entries, not {x!r}"
            )
        return x

    return jax.tree_util.tree_map_with_path(one, tree)


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a stage's folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())


def stages_in(workdir: Path) -> list[str]:
    """Stages of a workdir that have a checkpoint, oldest first; the best-so-far copies left out."""
    root = Path(workdir) / FOLDER
    if not root.is_dir():
        return []
    newest = {}
    for folder in root.iterdir():
        steps = steps_in(folder)
        if steps and not folder.name.endswith(BEST):
            newest[folder.name] = (folder / str(steps[-1])).stat().st_mtime_ns
    return sorted(newest, key=newest.get)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return UserError(
        f"checkpoint {path} is damaged ({reason}); delete that folder to use the one before, "
        "or start again with --resume=never"
    )


def _fits(meta: dict, part: str, target, path: Path) -> None:
    here, there = leaves_of(target), meta["leaves"][part]
    for name in sorted(set(here) | set(there)):
        a, b = there.get(name, "nothing"), here.get(name, "nothing")
        if a != b:
            raise UserError(
                f"checkpoint {path} does not fit: {part}/{name} is {a} there and {b} here; "
                "use the config it was trained with, or another --workdir"
            )


class Checkpoints:
    """Checkpoints of one stage of one run.

    keep: how many of the latest stay. Collective: in a run of several processes all of them call.
    """

    def __init__(self, workdir, stage: str, *, keep: int = 2, read_only: bool = False):
        import orbax.checkpoint as ocp

        # Threads of orbax log a traceback for each error that `writing` turns into one line.
        logging.getLogger("absl").addFilter(_not_orbax)
        self._ocp, self.stage = ocp, stage
        self.folder = Path(workdir).absolute() / FOLDER / stage
        self._mark = self.folder.with_name(stage + ".done.json")
        self._metas: dict[int, dict] = {}
        with writing(self.folder):
            if not read_only:
                self.folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else max(int(keep), 1),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        self.wait()
        step = distributed.first(self._manager.latest_step)
        if step is not None and step not in self._manager.all_steps():
            self._manager.reload()  # another machine wrote it
        return step

    def meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        path = self.folder / str(step)
        if step not in self._metas:
            args = self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
            try:
                meta = dict(self._manager.restore(step, args=args)["meta"])
                version = meta["format"]
            except Exception as error:
                raise _damaged(path, error) from error
            if version != FORMAT:
                raise UserError(
                    f"checkpoint {path} has format {version}, this version reads {FORMAT}; "
                    "use the version that wrote it, or start again in another --workdir"
                )
            self._metas[step] = meta
        return self._metas[step]

    def done(self) -> bool:
        """Whether the stage ended early (`save(done=True)`)."""
        step = self.latest()
        if step is None:
            return False
        marked = lambda: self._mark.exists() and read_json(self._mark)["step"] == step
        return distributed.first(marked) or bool(self.meta(step)["done"])

    def save(self, step: int, state: State, *, n: int | None = None, done=False, best=None) -> None:
        """Start to save `state`; the arrays may be donated as soon as this returns.

        A step that is there already is kept, and only marked where `done`.
        """
        args = self._ocp.args
        with writing(self.folder):
            if step not in self._manager.all_steps():
                params = _savable(state.params, "params")
                rest = _savable(_rest(state), "rest")
                leaves = {"params": leaves_of(params), "rest": leaves_of(rest)}
                meta = {"format": FORMAT, "stage": self.stage, "step": step, "done": done}
                meta |= {"n": n, "best": best, "leaves": leaves}
                items = args.Composite(
                    params=args.StandardSave(params),
                    rest=args.StandardSave(rest),
                    meta=args.JsonSave(meta),
                )
                self._metas.pop(step, None)
                self._manager.save(step, args=items, force=True)
            if done:
                self._manager.wait_until_finished()
                if jax.process_index() == 0:
                    write_json(self._mark, {"step": step})

    def restore(self, target: State, step: int | None = None) -> State:
        """The state at `step` (default: latest). `target`: shapes with the shardings to come."""
        step = self.latest() if step is None else step
        meta, path = self.meta(step), self.folder / str(step)
        rest = _rest(target)
        _fits(meta, "params", target.params, path)
        _fits(meta, "rest", rest, path)
        found = self._read(step, {"params": target.params, "rest": rest})
        return target.replace(params=found["params"], **found["rest"])

    def params(self, target, step: int | None = None):
        """The parameters alone; `target`: their shapes with the shardings to come."""
        step = self.latest() if step is None else step
        _fits(self.meta(step), "params", target, self.folder / str(step))
        return self._read(step, {"params": target})["params"]

    def _read(self, step: int, targets: dict[str, Any]):
        args = self._ocp.args
        items = args.Composite(**{k: args.StandardRestore(v) for k, v in targets.items()})
        try:
            return self._manager.restore(step, args=items)
        except jax.errors.JaxRuntimeError:
            raise  # the device's trouble, not the file's
        except Exception as error:
            raise _damaged(self.folder / str(step), error) from error

    def wait(self) -> None:
        """Until every save is on disk."""
        with writing(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go."""
        with writing(self.folder):
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def on_device(tree, shardings=None):
    """Shapes of a tree, each with its sharding.

    Default: all on the first device; in a run of several processes, whole on every device.
    """
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if jax.process_count() > 1:
            here = replicated(make_mesh((-1, 1, 1, 1)))
        shardings = jax.tree.map(lambda _: here, tree)
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(shape, tree, shardings)


def find(path, stage: str | None = None) -> tuple[Path, str, int]:
    """(workdir, stage, step) of a workdir, a stage's folder or one checkpoint in it.

    Default: the stage that was saved last, its latest step. "rl-best" is the best of stage "rl".
    """
    path = Path(path).expanduser().absolute()
    if path.parent.parent.name == FOLDER and path.name.isdigit():
        workdir, stage, step = path.parents[2], path.parent.name, int(path.name)
        known = steps_in(path.parent)
    else:
        workdir, inner = (
            (path.parents[1], path.name) if path.parent.name == FOLDER else (path, None)
        )
        stages = stages_in(workdir)
        stage = stage or inner or (stages[-1] if stages else "")
        known = steps_in(workdir / FOLDER / stage) if stage else []
        step = known[-1] if known else -1
    if step not in known:
        there = ", ".join(stages_in(workdir)) or "none"
        raise UserError(
            f"{path} has no checkpoint{f' of stage {stage!r}' if stage else ''} (stages there: "
            f"{there}); give a workdir of a run that has saved one"
        )
    return workdir, stage, step


def load(path, target, *, stage: str | None = None, shardings=None):
    """Parameters from a workdir or checkpoint, as evaluation, export and `init_from` need them.

    `target`: arrays or shapes of the parameters; `shardings`: where they go (default: where
    `target` says, else the first device).
    """
    workdir, stage, step = find(path, stage)
    if shardings is None:
        shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), target)
        shardings = (
            None if None in jax.tree.leaves(shardings, is_leaf=lambda x: x is None) else shardings
        )
    with Checkpoints(workdir, stage, read_only=True) as checkpoints:
        return checkpoints.params(on_device(target, shardings), step)
