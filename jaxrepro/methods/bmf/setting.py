"""The algorithmic choices of a BMF run: plain values, checked once, hashable, so that programs close over them."""

import dataclasses
import math
from typing import Any

from jaxrepro.config import UserError
from jaxrepro.methods.bmf.presets import PRESETS

ALGORITHMS = ("ac", "mf_ac", "mf_ac_plus", "bmf", "bmf_random")
CHOICES = {
    "preset": tuple(PRESETS),
    "algorithm": ALGORITHMS,
    "mf_form": ("bilevel", "mixed"),
    "levels": ("both", "intra", "inter"),
    "inter": ("attention", "cosine", "cosine_positive"),
    "attention_key": ("latent", "state"),
    "cluster_on": ("mean", "sample", "observation"),
    "vae_target": ("state", "state_action", "state_action_value"),
    "vae_reduction": ("official", "fixed"),
    "bootstrap": ("official", "fixed"),
    "nan_probabilities": ("zero", "keep"),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained and how; defaults are those of the preset `fixed`.

    Errors: UserError (a ValueError) that names the value, what is allowed, and the remedy.
    """

    preset: str = "fixed"  # whose defaults these are; `of_preset` fills them in
    algorithm: str = "bmf"
    # groups and mean fields
    groups: int = 4
    group_interval: int = 50  # steps from one grouping to the next, the first at step 0
    mf_form: str = "bilevel"  # two vectors a agent, or their mixture
    levels: str = "both"  # of the bilevel form: a level that is left out is all zeros
    inter: str = "attention"  # weights between groups
    attention_key: str = "latent"  # a group's state in the attention: mean latent, or observation
    attention_dim: int = 32
    cluster_on: str = "mean"  # K-means of posterior means, samples, or raw observations
    exclude_self: bool = False  # whether an agent's own action is left out of its group's mean
    mask_id_features: bool = (
        False  # the bits of the agent's index are zeroed wherever they are read
    )
    # variational autoencoder
    vae_target: str = "state_action_value"
    vae_reduction: str = "fixed"
    vae_hidden: int = 512
    latent: int = 32
    beta: float | int = 1.0  # weight of the KL
    r2_weight: float | int = 1.0  # weight of the value term
    r2_divide_gamma: bool = True  # (f - r) / gamma, not f - r, is compared with V(s')
    shared_vae: bool = True  # one for both teams; else the opponent keeps an untrained one
    vae_lr: float | int = 1e-4
    # actor and critic
    hidden: int = 256
    bootstrap: str = "fixed"  # where an agent's steps end: V(last observation), or 0 for the dead
    nan_probabilities: str = "keep"
    gamma: float | int = 0.95
    value_coef: float | int = 0.1
    entropy_coef: float | int = 0.08
    clip: float | int = 0.5  # norm of the gradient of each sub-network; 0: not clipped
    lr: float | int = 1e-4
    self_play_tau: float | int = 0.01  # share of itself that the opponent keeps

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}"
                )
        for name in ("groups", "attention_dim", "vae_hidden", "latent", "hidden"):
            _whole(name, getattr(self, name), 1)
        _whole("group_interval", self.group_interval, 1, "; one beyond the horizon groups once")
        for name in ("beta", "r2_weight", "value_coef", "entropy_coef", "clip"):
            _number(name, getattr(self, name), 0, math.inf)
        for name in ("gamma", "self_play_tau"):
            _number(name, getattr(self, name), 0, 1)
        for name in ("lr", "vae_lr"):
            _number(name, getattr(self, name), 0, math.inf, above=True)
        if self.gamma == 0 and self.r2_divide_gamma and self.vae_target == "state_action_value":
            raise UserError(
                "gamma=0 divides by 0 in the VAE's value term; use r2_divide_gamma=False"
            )
        if self.mf_form == "mixed" and self.levels != "both":
            raise UserError(
                f"levels={self.levels!r} with mf_form='mixed', which has one vector; use 'bilevel'"
            )

    @property
    def grouped(self) -> bool:
        """Whether agents are divided into groups, so that a VAE is needed."""
        return self.algorithm in ("bmf", "bmf_random")

    @property
    def group_count(self) -> int:
        """Groups whose means are kept: 1, the team, for mean fields without groups."""
        return self.groups if self.grouped else 1

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the mean-field vectors that the base network reads."""
        if self.algorithm in ("ac", "mf_ac"):
            return ()
        return ("intra", "inter") if self.mf_form == "bilevel" else ("mean_field",)

    @property
    def attends(self) -> bool:
        """Whether weights between groups have parameters."""
        return self.grouped and self.inter == "attention" and self.levels != "intra"

    @property
    def compares_observations(self) -> bool:
        """Whether attention compares mean observations of groups; else weights compare latents."""
        return self.grouped and self.inter == "attention" and self.attention_key == "state"


def of_preset(preset: str, **changes: Any) -> Setting:
    """The setting of a preset ("official" or "fixed") with some fields changed."""
    if preset not in PRESETS:
        raise UserError(f"preset={preset!r} is not one of {', '.join(PRESETS)}")
    return Setting(**{"preset": preset, **PRESETS[preset], **changes})


def options(preset: str) -> dict[str, Any]:
    """What `config.bmf` may set, and its value in a preset: all fields but the preset and the algorithm."""
    found = dataclasses.asdict(of_preset(preset))
    return {k: v for k, v in found.items() if k not in ("preset", "algorithm")}


def _whole(name, value, low, remedy=""):
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{name}={value!r}; use a whole number from {low} up{remedy}")


def _number(name, value, low, high, above=False):
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not (low < value if above else low <= value) or value > high:
        limit = (
            f"above {low}"
            if above
            else f"from {low} " + ("up" if high == math.inf else f"to {high}")
        )
        raise UserError(f"{name}={value!r}; use a number {limit}")
