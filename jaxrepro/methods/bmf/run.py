"""Bi-level mean field end to end: a VAE that groups agents, then self-play of two teams in the battle.

    typed      is the mean of a group worth what its closed form says? (typed.py; no battle)
    collapse   does the VAE keep its latents, in the official loss and in the repaired one? (collapse.py)
    vae        `vae.steps` updates of VAE and policy; left out without groups, or with `init_from`
    policy     `steps` updates of the policy, the VAE frozen
    evaluate   games against scripted players and against itself, from both sides (arena.py), and a film

One run trains one arm, `seeds` seeds of it at once; `jaxrepro.reproduce` compares arms. The policy goes on from the stage
"vae"; with `init_from`, which gives the VAE alone, it starts afresh.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrepro import sharding
from jaxrepro.config import UserError
from jaxrepro.distributed import first
from jaxrepro.methods.bmf import build, collapse, evaluation, films, learning, rollout, typed
from jaxrepro.methods.bmf.build import Parts
from jaxrepro.methods.bmf.learning import POLICY, VAE
from jaxrepro.methods.bmf.rollout import Learnt
from jaxrepro.train import checkpoint, memory
from jaxrepro.train.loop import Run
from jaxrepro.train.state import State
from jaxrepro.train.step import NONFINITE, compile_step

SHOWN = ("loss", "kills", "losses", "attack_rate", "vae_kl_per_dim")


def run(
    config: Any, workdir: Any, *, resume: str = "auto", profile: str | None = None
) -> dict[str, float]:
    """Train one arm in `workdir` and evaluate it; returns what summary.json holds."""
    build.check(config)
    s = build.prepare(config)
    build.looked_at(s.plan)
    with Run(config, workdir, resume=resume, profile=profile, show=SHOWN) as run:
        if run.finished:
            return run.results
        if config.env.resolution != "sequential":
            run.say(f"attacks are {config.env.resolution}: these are not MAgent2's rules")
        results: dict[str, float] = {}
        if n := config.typed.seeds:
            results |= run.once("typed", partial(typed.study, n, first=config.seed * n))
        if n := config.collapse.steps:
            results |= run.once("collapse", partial(collapse.study, n, seed=config.seed))
        vae, learnt = train_vae(run, s)
        if config.steps:
            params = train_policy(run, s, vae, learnt)
        else:
            params = {"policy": learnt["policy"], "vae": vae}
        params = sharding.fetch(params)
        results |= evaluation.evaluate(s, params)
        first(lambda: films.write(s, params, run.path("films/self.gif"), seed=config.seed))
        for line in evaluation.lines(results):
            run.say(line)
        run.summary(results)
        return run.results


def train_vae(run: Run, s: Parts) -> tuple[Any, Any]:
    """The VAE of each seed, and what else its stage has learnt; (None, None) without groups."""
    if not s.plan.setting.grouped:
        return None, None
    if source := s.config.init_from:
        return given_vae(s, source), None
    state = train(run, s, VAE, s.config.vae.steps, partial(learning.begin_vae, s.plan))
    return state.params, state.extra


def given_vae(s: Parts, source: str) -> Any:
    """The VAE that a run has trained."""
    shapes = jax.eval_shape(jax.vmap(partial(learning.init_vae, s.plan)), build.keys_of(s, VAE, 0))
    return checkpoint.load(source, shapes, stage=VAE)


def train_policy(run: Run, s: Parts, vae: Any, learnt: Any) -> Any:
    """Policy and VAE of each seed after `steps` updates."""
    if learnt is not None:
        kept = ("policy", "policy_opt", "opponent", "opponent_vae")
        learnt = {name: learnt[name] for name in kept}
    begin = lambda key, vae, learnt: learning.begin_policy(s.plan, key, vae, learnt)
    return train(run, s, POLICY, s.config.steps, begin, vae, learnt).params


def train(run: Run, s: Parts, stage: str, steps: int, begin: Any, *given: Any) -> State:
    """The state of a stage after `steps` updates; begin(key, *given) -> the parts of a state of one seed."""
    keys = build.keys_of(s, f"{stage} begins", 0)

    def init() -> State:
        return State(step=jnp.zeros((), jnp.int32), **jax.vmap(begin)(keys, *given))

    abstract = jax.eval_shape(init)
    at = build.state_at(s, abstract)
    state = run.restore(init, stage=stage, shardings=at, abstract=abstract, jit=not given)
    step = compile_step(stepping(s, stage), at)
    for i in run.steps(state, steps):
        state, metrics = step(state, build.keys_of(s, stage, i))
        run.log(i, metrics)
        run.save(i, state)
    return state


def stepping(s: Parts, stage: str) -> Any:
    """`step(state, keys) -> (state, metrics)` of all seeds; metrics are means over the seeds."""
    spec = build.axis(s.mesh, len(s.seeds), s.plan.envs)

    def step(state: State, keys: Any) -> tuple[State, dict[str, Any]]:
        parts = {name: getattr(state, name) for name in ("params", "opt", "extra")}
        games = NamedSharding(s.mesh, P(spec[1])) if len(spec) > 1 else None
        one = lambda part, key: learning.update(s.plan, stage, state.step, part, key, games)
        new, metrics = jax.vmap(one)(parts, keys)
        wrong = metrics.pop(NONFINITE).max()
        metrics = {name: x.mean() for name, x in metrics.items()}
        return State(step=state.step + 1, **new), metrics | {NONFINITE: wrong}

    return step


# After training, and before it -------------------------------------------------------------------


def trained(config: Any, workdir: Any) -> tuple[Parts, Any]:
    """The parts and the parameters {"policy", "vae"} of a run, which lead with the seed."""
    build.check(config)
    s = build.prepare(config)
    keys = build.keys_of(s, POLICY, 0)
    vae = None
    if s.plan.setting.grouped:
        vae = jax.eval_shape(jax.vmap(partial(learning.init_vae, s.plan)), keys)
    target = {
        "policy": jax.eval_shape(jax.vmap(partial(learning.init_policy, s.plan)), keys),
        "vae": vae,
    }
    return s, checkpoint.load(workdir, target, stage=POLICY)


def evaluate(
    config: Any, workdir: Any, *, split: str = "test", n: int | None = None
) -> dict[str, float]:
    """The numbers of a trained run, over n games against each opponent."""
    if split != "test":
        raise UserError(f"split {split!r}: teams are evaluated on test")
    if n is not None:
        with config.unlocked():
            config.eval.n = n
    return evaluation.evaluate(*trained(config, workdir))


def sample(
    config: Any,
    workdir: Any,
    *,
    prompt: str | None = None,
    image: Any = None,
    n: int = 1,
    temperature: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Write n games below workdir/films, each as a GIF and a replay, and return their paths.

    prompt: who plays blue: "self" (default), "random" or "rush".
    """
    if image is not None:
        raise UserError("--image: games are played from the start; leave it out")
    if temperature is not None:
        raise UserError("--temperature: actions are drawn from the policy as it is; leave it out")
    s, params = trained(config, workdir)
    return films.sample(s, params, workdir, opponent=prompt or build.SELF, n=n, seed=seed)


def plan(config: Any) -> memory.Plan:
    """Shapes of the stage that needs the most memory, for --dry_run; touches no file, network or device."""
    build.check(config)
    mesh = sharding.abstract_mesh(config.mesh)
    s = Parts(config, build.plan_of(config), mesh, tuple(range(config.seeds)))
    grouped = s.plan.setting.grouped
    stages = [VAE] * bool(grouped and config.vae.steps and not config.init_from)
    return memory.largest(*(_plan(s, stage) for stage in [*stages, POLICY]))


def _plan(s: Parts, stage: str) -> memory.Plan:
    begin = learning.begin_vae
    if stage == POLICY:
        untrained = learning.init_vae if s.plan.setting.grouped else lambda plan, key: None
        begin = lambda plan, key: learning.begin_policy(plan, key, untrained(plan, key))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), len(s.seeds)))
    made = jax.eval_shape(jax.vmap(partial(begin, s.plan)), keys)
    spec = build.axis(s.mesh, len(s.seeds), s.plan.envs)
    seeds, games = P(*spec[:1]), P(spec[0] if spec else None, None, *spec[1:])
    state = memory.sharded(made, NamedSharding(s.mesh, seeds))
    first = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
    policy = first(made["extra" if stage == VAE else "params"]["policy"])
    vae = first(made["params"] if stage == VAE else made["params"]["vae"])
    play = lambda who, keys: rollout.episodes(s.plan.game, (who, who), s.plan.steps, keys)
    worlds = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), s.plan.envs))
    batch, _ = jax.eval_shape(play, Learnt(policy, vae), worlds)
    seed = lambda x: jax.ShapeDtypeStruct((len(s.seeds), *x.shape), x.dtype)
    rows = NamedSharding(s.mesh, games)
    batch = jax.tree.map(
        seed, batch._replace(final_view=None, final_features=None, final_groups=None)
    )
    agents = s.plan.steps * s.plan.envs * s.plan.game.env.sizes["red"] // s.plan.micro_batches
    width = 8 * s.plan.setting.hidden + sum(batch.view.shape[-3:])
    kept = jax.ShapeDtypeStruct((len(s.seeds), agents, width), jnp.float32)
    return memory.Plan(
        params=state["params"],
        opt={"optimiser": state["opt"], "other": state["extra"]},
        activations={"hidden layers": memory.sharded(kept, NamedSharding(s.mesh, seeds))},
        batch=memory.sharded(batch, rows),
        mesh=s.mesh,
        stage=stage,
    )
