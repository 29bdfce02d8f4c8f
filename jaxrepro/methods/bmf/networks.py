"""Actor and critic of BMF, arXiv:2505.06706, and of the baselines, on one interface.

    h_v = relu(L v),  h_f = relu(L f),  h_mu = relu(L relu(L mu))  a vector,   h = [h_v; h_f; h_mu]       base
    pi = softmax(L (relu(L h) / 0.1)),   V = L relu(L h)                                         actor, critic

"bmf", "bmf_random", "mf_ac_plus": the networks of BMF's official code; in the bilevel form h has a mean-field tower for
each of the two vectors. "ac", "mf_ac": those of the mean-field actor-critic (arXiv:1802.05438, its authors' code): no
mean field in the actor; in "ac" the value is a linear function of the actor's hidden layer, in "mf_ac" the critic alone
reads the mean field. Attention between groups (shape from BMF's figure; one head and its width are inferred):

    w_kl = softmax_l ((W_q s_k) . (W_k s_l) / sqrt d)  over groups l that have members

Vectors mu are tuples: () for "ac", one for "mf_ac" and the mixed form, (intra, inter) for the bilevel form.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from jaxrepro.methods.bmf.layers import Dense
from jaxrepro.methods.bmf.setting import Setting

TEMPERATURE = 0.1  # divides the last hidden layer of the actor, not its logits
TOWER = (64, 32)
ID_FEATURES = 10  # the features begin with the bits of the agent's index
SMALLEST = 1e-10  # of a probability; the largest, 1 - 1e-10, is 1 in float32

Params = Mapping[str, Any]
Vectors = tuple[Float[Array, "*b a n"], ...]


class Tower(nn.Module):
    """What the networks read of a mean-field vector."""

    @nn.compact
    def __call__(self, mu):
        return nn.relu(Dense(TOWER[1], name="out")(nn.relu(Dense(TOWER[0], name="hidden")(mu))))


class Base(nn.Module):
    """View, features and mean fields, read by actor and critic; `shared`: one more layer (AC)."""

    hidden: int
    towers: tuple[str, ...]
    shared: bool = False

    @nn.compact
    def __call__(self, view, features, vectors):
        parts = [
            nn.relu(Dense(self.hidden, name="view")(view)),
            nn.relu(Dense(self.hidden, name="features")(features)),
        ]
        parts += [Tower(name=name)(mu) for name, mu in zip(self.towers, vectors)]
        h = jnp.concatenate(parts, -1)
        return nn.relu(Dense(2 * self.hidden, name="hidden")(h)) if self.shared else h


class Actor(nn.Module):
    """Logits of the actions."""

    hidden: int
    actions: int
    direct: bool = False  # the base has the hidden layer already

    @nn.compact
    def __call__(self, h):
        if not self.direct:
            h = nn.relu(Dense(2 * self.hidden, name="hidden")(h))
        return Dense(self.actions, name="logits")(h / TEMPERATURE)


class Critic(nn.Module):
    """V; `tower`: it reads a mean field that the base does not (MF-AC)."""

    hidden: int
    direct: bool = False
    tower: bool = False

    @nn.compact
    def __call__(self, h, vectors):
        if self.tower:
            h = jnp.concatenate([h, Tower(name="mean_field")(vectors[0])], -1)
        if not self.direct:
            h = nn.relu(Dense(self.hidden, name="hidden")(h))
        return Dense(1, name="value")(h)[..., 0]


class Attention(nn.Module):
    """Scores (g, g) of group states for one another."""

    width: int

    @nn.compact
    def __call__(self, states):
        query = Dense(self.width, bias=False, name="query")(states)
        key = Dense(self.width, bias=False, name="key")(states)
        scores = jnp.einsum("...gd,...ld->...gl", query, key, precision="highest")
        return scores / self.width**0.5


def _modules(setting, actions):
    ac = setting.algorithm == "ac"
    return (
        Base(setting.hidden, setting.towers, shared=ac),
        Actor(setting.hidden, actions, direct=ac),
        Critic(setting.hidden, direct=ac, tower=setting.algorithm == "mf_ac"),
    )


def init_policy(
    key: PRNGKeyArray,
    setting: Setting,
    view_shape: tuple[int, ...],
    features: int,
    num_actions: int,
) -> dict[str, Any]:
    """Float32 parameters {"base", "actor", "critic"[, "attention"]}.

    view_shape: of one agent, such as (13, 13, 7). features: their number. "attention" is there where groups attend to
    one another.
    """
    keys = jax.random.split(key, 4)
    base, actor, critic = _modules(setting, num_actions)
    size = 1
    for n in view_shape:
        size *= n
    view, f, mu = jnp.zeros(size), jnp.zeros(features), jnp.zeros(num_actions)
    vectors = (mu,) * max(len(setting.towers), 1)
    variables = base.init(keys[0], view, f, vectors)
    h = base.apply(variables, view, f, vectors)
    params = {
        "base": variables["params"],
        "actor": actor.init(keys[1], h)["params"],
        "critic": critic.init(keys[2], h, vectors)["params"],
    }
    if setting.attends:
        width = size + features if setting.compares_observations else setting.latent
        head = Attention(setting.attention_dim)
        params["attention"] = head.init(keys[3], jnp.zeros((1, width)))["params"]
    return params


def visible_features(setting: Setting, features: Num[Array, "*b f"]) -> Float[Array, "*b f"]:
    """Features in float32, the bits of the agent's index zeroed where the setting masks them."""
    features = features.astype(jnp.float32)
    if setting.mask_id_features:
        features = jnp.where(jnp.arange(features.shape[-1]) < ID_FEATURES, 0, features)
    return features


def flat_view(view: Num[Array, "*b y x c"]) -> Float[Array, "*b d"]:
    """Views as vectors, row by row, channels last."""
    return view.reshape(*view.shape[:-3], -1).astype(jnp.float32)


def observation(
    setting: Setting, view: Num[Array, "*b y x c"], features: Num[Array, "*b f"]
) -> Float[Array, "*b d"]:
    """x = [flat view; features], what VAE and clusters read."""
    return jnp.concatenate([flat_view(view), visible_features(setting, features)], -1)


def policy_and_value(
    params: Params,
    setting: Setting,
    view: Num[Array, "*b y x c"],
    features: Num[Array, "*b f"],
    mean_field: tuple[Float[Array, "*b n"], ...],
) -> tuple[Float[Array, "*b n"], Float[Array, "*b"]]:
    """Logits of the actions, and V, of agents with their mean fields (`groups.mean_field_input`)."""
    base, actor, critic = _apply(params, setting, view, features, mean_field)
    h = base()
    return actor(h), critic(h)


def policy(
    params: Params,
    setting: Setting,
    view: Num[Array, "*b y x c"],
    features: Num[Array, "*b f"],
    mean_field: tuple[Float[Array, "*b n"], ...],
) -> Float[Array, "*b n"]:
    """Logits of the actions."""
    base, actor, _ = _apply(params, setting, view, features, mean_field)
    return actor(base())


def value(
    params: Params,
    setting: Setting,
    view: Num[Array, "*b y x c"],
    features: Num[Array, "*b f"],
    mean_field: tuple[Float[Array, "*b n"], ...],
) -> Float[Array, "*b"]:
    """V."""
    base, _, critic = _apply(params, setting, view, features, mean_field)
    return critic(base())


def _apply(params, setting, view, features, vectors):
    actions = params["actor"]["logits"]["bias"].shape[-1]
    base, actor, critic = _modules(setting, actions)
    read = flat_view(view), visible_features(setting, features), vectors
    return (
        lambda: base.apply({"params": params["base"]}, *read),
        lambda h: actor.apply({"params": params["actor"]}, h),
        lambda h: critic.apply({"params": params["critic"]}, h, vectors),
    )


def probabilities(setting: Setting, logits: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """pi, clipped to [1e-10, 1 - 1e-10] and not normalised again, as the official code has it."""
    pi = jax.nn.softmax(logits)
    if setting.nan_probabilities == "zero":
        pi = jnp.where(jnp.isnan(pi), 0, pi)
    return jnp.clip(pi, SMALLEST, 1 - SMALLEST)


def draw(setting: Setting, logits: Float[Array, "*b n"], key: PRNGKeyArray) -> Int[Array, "*b"]:
    """Actions drawn from pi, in evaluation too."""
    return jax.random.categorical(key, jnp.log(probabilities(setting, logits)))


def attention_weights(
    params: Params,
    setting: Setting,
    states: Float[Array, "*b g k"],
    occupied: Bool[Array, "*b g"],
) -> Float[Array, "*b g g"]:
    """Rows of softmax over the groups that have members; all zeros where none has."""
    scores = Attention(setting.attention_dim).apply({"params": params["attention"]}, states)
    keep = jnp.broadcast_to(occupied[..., None, :], scores.shape)
    top = jax.lax.stop_gradient(jnp.where(keep, scores, -jnp.inf).max(-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    # the inner `where` keeps what is masked out of the exponential, and NaN out of the gradient
    shares = jnp.where(keep, jnp.exp(jnp.where(keep, scores - top, 0)), 0)
    total = shares.sum(-1, keepdims=True)
    return shares / jnp.where(total > 0, total, 1)
