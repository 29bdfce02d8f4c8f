"""BMF (arXiv:2505.06706): agents of a large team see the mean actions of groups instead of one mean of all.

Claim of the paper: grouping agents by a learnt latent and giving each the mean of its group and a mixture of the groups'
means removes the noise that one average of everybody brings, and wins against mean-field methods.

  python -m jaxrepro.launch --config=configs/bmf.py          tiny: 2 CPU cores, 4 minutes
  python -m jaxrepro.launch --config=configs/bmf.py:gpu      64 against 64, three seeds at once, one GPU (unmeasured)
  python -m jaxrepro.launch --config=configs/bmf.py:paper    the official code's 4000 episodes (unmeasured)

`--config.preset=official` is the published algorithm with its collapsing VAE, at the size's rates and batches; its own rates
and single full-batch steps are those of `paper`. `fixed` (default) is the method as meant.
`--config.algorithm=ac` (mf_ac, mf_ac_plus, bmf_random) are baselines on the same rollouts; `--config.bmf.groups=8`,
`bmf.group_interval=10`, `bmf.inter=cosine`, `bmf.levels=intra`, `bmf.vae_target=state`, `bmf.cluster_on=observation`
the ablations. `--config.seeds=5` trains five seeds at once. After training, `python -m jaxrepro.sample` writes a game
as a GIF and `python -m jaxrepro.methods.bmf.tournament RUN RUN ...` plays trained teams against each other.
The tasks, table and hyper-parameters of the paper are not known to us: `paper` is what the official code does.
"""

from ml_collections import ConfigDict, config_dict

from jaxrepro.methods.bmf.setting import options

ARMS = {"ac": "AC", "mf_ac_plus": "MF-AC+", "bmf": "BMF-AC", "bmf_random": "BMF-random"}


def _named(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


_OF_GAMES = "win", "points", "tie", "kills", "losses", "attack_rate"
_OF_LATENTS = (
    *("kl_per_dim", "linear_kl_per_dim", "active_units"),
    *("agreement_of_samples", "agreement_of_means"),
)
SHOWN = (  # beside the claims
    *_named("test/random", *_OF_GAMES),
    *_named("test/rush", *_OF_GAMES),
    *_named("test/self", *_OF_GAMES),
    *(f"typed/{arm}/ratio" for arm in ("none", "mf", "bilevel", "mixed", "random", "true")),
    *_named("test/groups", "ari_position", "silhouette", "persistence", "pairs"),
    *_named("test/groups/amid", "ari_position", "ari_health", "silhouette"),
    *_named("test/vae", "kl_per_dim", "active_units"),
    *_named("test/noise", "none", "team", "groups", "constant", "variance"),
    *_named("collapse/official/rush", *_OF_LATENTS),
    *_named("collapse/official/random", *_OF_LATENTS),
    *_named("collapse/fixed/rush", *_OF_LATENTS),
    *_named("collapse/fixed/random", *_OF_LATENTS),
)
SIZES = {
    "tiny": {"needs": "2 CPU cores, 2 GB", "minutes": "4"},
    "gpu": {"needs": "one 80 GB GPU", "minutes": "10-30 (unmeasured)"},
    "paper": {"needs": "one 80 GB GPU a run", "minutes": "hours (unmeasured)"},
}


def get_config(size: str = "tiny") -> ConfigDict:
    """The configuration of one size."""
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    config = ConfigDict()
    config.method = "bmf"
    config.seed = 0
    config.seeds = 1  # trained at once: seed, seed + 1, ...
    config.steps = 320  # updates of the policy, each on `envs` whole episodes
    config.mesh = (1, 1, 1, 1)  # data (episodes), fsdp, sequence, tensor
    config.init_from = config_dict.placeholder(str)  # a workdir: its VAE is taken
    config.preset = "fixed"  # fixed, official
    config.algorithm = "bmf"  # ac, mf_ac, mf_ac_plus, bmf, bmf_random

    # What the preset decides; a value given here wins.
    config.bmf = bmf = ConfigDict()
    for name, value in options("fixed").items():
        bmf[name] = config_dict.placeholder(type(value))
    bmf.hidden, bmf.vae_hidden, bmf.lr, bmf.vae_lr = 64, 128, 3e-3, 1e-3

    # Battle: see envs/battle.py. Rewards None: the official code's.
    config.env = env = ConfigDict(dict(name="battle", map_size=20, horizon=150, side="alternate"))
    env.resolution = "sequential"  # simultaneous: not MAgent2's rules
    env.minimap = env.extra_features = True
    for name in ("step", "dead", "attack", "hit", "kill"):
        env[f"{name}_reward"] = config_dict.placeholder(float)
    config.envs = 4  # games of an update
    # of the policy's update, a divisor of envs: less memory, the same update
    config.micro_batches = 1

    # The VAE is trained before the policy, on the same rollouts; 0 updates: it is taken from init_from, or not needed.
    config.vae = vae = ConfigDict()
    vae.steps = 200  # armies fight from about the 80th on, which it should have seen
    vae.updates = 24  # of the VAE in a step; 1 with batch 0 is the official code
    vae.batch = 512  # rows from the replay buffer; 0: all of the step's episodes, no buffer
    vae.replay = 8192  # rows that are kept
    vae.warmup = 60  # steps in which beta rises from 0; none with the official reduction

    config.eval = ConfigDict(dict(n=200, opponents=("random", "rush"), self_play=True))
    # steps of these games: the official code's, enough to hunt down who does not fight
    config.eval.horizon = 400
    config.eval.tie = "half"  # both: a tie counts as a win of both sides, as the MF-Q authors do
    # games for critics with and without mean fields (evaluation.py); 0: none
    config.eval.noise = 16
    # studies before training: with a closed form (typed.py), of the VAE's collapse (collapse.py)
    config.typed = ConfigDict(dict(seeds=0))
    config.collapse = ConfigDict(dict(steps=0))
    config.checkpoint = ConfigDict(dict(every=20, keep=1))
    config.log = ConfigDict(dict(every=1, tensorboard=True, curves=True))
    config.log.wandb = config_dict.placeholder(str)  # project name; needs the extra "wandb"
    if size == "tiny":
        return config

    bmf.hidden = bmf.vae_hidden = bmf.lr = bmf.vae_lr = None
    env.update(dict(map_size=40, horizon=400))
    if size == "gpu":
        bmf.lr = 1e-3  # not tuned: nothing was measured at this size
        config.steps, config.envs, config.seeds, config.micro_batches = 150, 32, 3, 4
        config.vae.update(dict(steps=100, updates=16, batch=4096, replay=65536, warmup=30))
        config.eval.n = 100
        return config
    config.preset = "official"
    config.steps, config.envs = 2000, 1
    config.vae.update(dict(steps=2000, updates=1, batch=0, replay=0, warmup=0))
    config.checkpoint.every = 100
    return config


def resolve(config: ConfigDict) -> ConfigDict:
    """Fills what the preset decides and the user left untouched."""
    for name, value in options(config.preset).items():
        if config.bmf[name] is None:
            config.bmf[name] = value
    return config


def get_claims(size: str = "tiny") -> dict:
    """Arms and claims of a size; README says what moved after a look.

    All arms of a seed take one VAE and start from new policies.
    """
    arms = {arm: {"algorithm": arm} for arm in ARMS}
    if size != "tiny":
        return {"prelude": {"steps": 0}, "arms": arms, "claims": ()}
    arms["bmf"] |= {"typed.seeds": 5, "collapse.steps": 2000}
    return {
        "seeds": 3,
        "prelude": {"steps": 0},
        "arms": arms,
        "show": SHOWN,
        "claims": (
            *(
                {
                    "name": f"{name} beats random play",
                    "kind": "every_seed",
                    "arm": arm,
                    "metric": "test/random/win_lo",
                    "bound": 0.9,
                    "says": f"in 200 games a seed {name} kills more than the random policy, lower end of Wilson's interval",
                }
                for arm, name in ARMS.items()
            ),
            *(
                {
                    "name": f"BMF-AC against {name}",
                    "kind": "paired_difference",
                    "arm": "bmf",
                    "baseline": arm,
                    "metric": "test/rush/margin",
                    "says": f"kills less losses against a scripted rush are more with BMF-AC than with {name}",
                }
                for arm, name in ARMS.items()
                if arm != "bmf"
            ),
            *(
                {"kind": "every_seed", "arm": "bmf", "direction": direction, "bound": bound}
                | {"name": name, "metric": metric, "says": says}
                for name, metric, direction, bound, says in (
                    (
                        "mean field's closed form",
                        "typed/mf/deviation",
                        "<",
                        0.10,
                        "a critic that sees everybody's mean comes within 10 % of the least error, in each of 5 draws a seed",
                    ),
                    (
                        "groups remove aggregation noise",
                        "typed/bilevel/worst_ratio",
                        "<",
                        1.15,
                        "a critic of BMF comes within 15 % of the reward's own noise, in each of 5 draws a seed",
                    ),
                    (
                        "groups are the hidden types",
                        "typed/worst_ari",
                        ">",
                        0.9,
                        "adjusted Rand index of groups and types, in each of 5 draws a seed",
                    ),
                    (
                        "the official VAE collapses",
                        "collapse/official/rush/kl_per_dim",
                        "<",
                        1e-3,
                        "its loss leaves less than 0.001 nats a latent on observations of battles",
                    ),
                    *(
                        (
                            f"the repaired VAE does not ({data})",
                            f"collapse/fixed/{data}/kl_per_dim",
                            ">",
                            0.02,
                            f"the repaired loss leaves more than 0.02 nats a latent, {what}",
                        )
                        for data, what in (
                            ("rush", "on the same observations"),
                            ("random", "on observations of random play"),
                        )
                    ),
                )
            ),
        ),
    }
