"""Mean fields and groups of BMF: weights by hand, limits, lag, deaths, regrouping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmf_small import ACTIONS, AGENTS, ENVS, SIZE, STEPS, episodes, params_of, small
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrepro.config import UserError
from jaxrepro.methods.bmf import groups, networks, vae
from jaxrepro.methods.bmf.groups import GroupState

inputs = jax.jit(groups.mean_field_input, static_argnums=1)
weights = jax.jit(groups.group_weights, static_argnums=1)
update = jax.jit(groups.update_groups, static_argnums=1)
rng = np.random.default_rng(0)
X = jnp.asarray(rng.normal(size=(AGENTS, SIZE)), jnp.float32)
TAKEN = jnp.asarray([0, 1, 1, 2, 4, 4, 4], jnp.int32)
ALIVE = jnp.ones(AGENTS, bool)
KEY = jax.random.key(0)
HAND = jnp.array([[1.0, 0], [0, 1], [1, 1], [0, 0]])  # mean latents of four groups


def state(keys=HAND, labels=(0, 0, 1, 2, 2, 2, -1), taken=TAKEN, own=False, groups_=None):
    """A state with given mean latents."""
    g = len(keys) if groups_ is None else groups_
    labels = jnp.asarray(labels, jnp.int32)
    done = jax.nn.one_hot(taken, ACTIONS)
    means, count = groups.group_means(done, labels, g)
    return GroupState(labels, means, jnp.asarray(keys), count, done if own else None)


# cos of the three latents: 1, 0, 1/sqrt 2; the row (1, 0, .7071) over its sum 1.7071 is (.585786, 0, .414214).
def test_cosine_weights_equal_numbers_by_hand_and_the_empty_group_has_none():
    setting = small("official", groups=4)
    right = [
        [0.585786, 0, 0.414214, 0],
        [0, 0.585786, 0.414214, 0],
        [0.292893, 0.292893, 0.414214, 0],
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(weights({}, setting, state()), right, atol=1e-6)


def test_positive_cosine_weights_equal_numbers_by_hand():
    setting = small(inter="cosine_positive", groups=4)
    half = (1 + 2**-0.5) / 2  # (1 + cos) / 2 at 45 degrees; at 90 degrees 1/2
    rows = np.array([[1, 0.5, half, 0], [0.5, 1, half, 0], [half, half, 1, 0], [0, 0, 0, 0]])
    total = np.where(rows.sum(1) > 0, rows.sum(1), 1)[:, None]
    np.testing.assert_allclose(weights({}, setting, state()), rows / total, atol=1e-6)


def test_orthogonal_latents_keep_the_own_group_and_equal_ones_share_alike():
    setting = small("official")
    found = weights({}, setting, state(3.0 * jnp.eye(3)))
    np.testing.assert_array_equal(found, np.eye(3))
    found = weights({}, setting, state(jnp.ones((3, 2))))
    np.testing.assert_allclose(found, np.full((3, 3), 1 / 3), rtol=1e-6)
    policy = params_of(small())[0]
    found = weights(policy, small(), state(jnp.ones((3, 3))))
    np.testing.assert_allclose(found, np.full((3, 3), 1 / 3), rtol=1e-6)


def test_vectors_equal_group_means_mixed_by_the_weights():
    w = np.array([[0.585786, 0, 0.414214], [0, 0.585786, 0.414214], [0.292893, 0.292893, 0.414214]])
    means = np.array([[0.5, 0.5, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1 / 3, 0, 2 / 3]])
    of = [0, 0, 1, 2, 2, 2]
    (mixed,) = inputs({}, small("official", groups=4), state())
    np.testing.assert_allclose(mixed[:6], (w @ means)[of], atol=1e-6)
    assert not mixed[6].any()  # dead
    intra, inter = inputs({}, small(inter="cosine", groups=4), state())
    np.testing.assert_allclose(intra[:6], means[of], rtol=1e-6)
    np.testing.assert_array_equal(inter, mixed)
    for level, keep in (("intra", 0), ("inter", 1)):
        one = inputs({}, small(inter="cosine", groups=4, levels=level), state())
        np.testing.assert_array_equal(one[keep], (intra, inter)[keep])
        assert not one[1 - keep].any()


def test_an_agent_left_out_of_its_mean_sees_the_others_of_its_group():
    setting = small(inter="cosine", groups=4, exclude_self=True)
    intra, inter = inputs({}, setting, state(own=True))
    done = np.eye(ACTIONS)[np.asarray(TAKEN)]
    right = np.stack([done[1], done[0], 0 * done[2], done[[4, 5]].mean(0), done[[3, 5]].mean(0), done[[3, 4]].mean(0)])  # fmt: skip
    np.testing.assert_allclose(intra[:6], right, atol=1e-6)
    # agent 3: group 2 with weights .292893, .292893, .414214 on the groups 0, 1 and its own without itself
    means = np.stack([done[:2].mean(0), done[2], right[3]])
    np.testing.assert_allclose(inter[3], [0.292893, 0.292893, 0.414214] @ means, atol=1e-6)
    (mixed,) = inputs({}, small("official", groups=4, exclude_self=True), state(own=True))
    np.testing.assert_array_equal(mixed, inter)


@pytest.mark.parametrize(
    "form, inter, alone",
    [
        ("mixed", "cosine", False),
        pytest.param("mixed", "attention", True, marks=pytest.mark.slow),
        ("bilevel", "attention", False),
        pytest.param("bilevel", "cosine_positive", True, marks=pytest.mark.slow),
    ],
)
def test_one_group_is_the_mean_field_of_the_team_bit_for_bit(form, inter, alone):
    both = dict(mf_form=form, inter=inter, exclude_self=alone)
    bmf, plus = small(groups=1, **both), small(algorithm="mf_ac_plus", **both)
    policy, encoder = params_of(bmf)
    alive = ALIVE.at[3].set(False)
    new = {}
    for setting in (bmf, plus):
        first = groups.init_groups(setting, AGENTS, ACTIONS, SIZE)
        new[setting] = update(encoder, setting, first, 0, X, TAKEN, alive, KEY)
    a, b = (inputs(policy, s, new[s]) for s in (bmf, plus))
    assert len(a) == len(b) == (2 if form == "bilevel" else 1)
    for x, y in zip(a, b):
        # without oneself a product and a difference are rounded, once or twice as the compiler fuses them
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-7 if alone else 0)
    right = np.eye(ACTIONS)[np.asarray(TAKEN)] * np.asarray(alive)[:, None]
    if not alone:
        np.testing.assert_allclose(b[0][0], right.sum(0) / 6, rtol=1e-6)
    else:
        np.testing.assert_allclose(b[0][0], right[1:].sum(0) / 5, atol=1e-6)


@pytest.mark.parametrize(
    ("levels", "kept"), [("both", (1, 1)), ("intra", (1, 0)), ("inter", (0, 1))]
)
def test_the_mean_of_the_team_takes_the_towers_that_levels_leaves(levels, kept):
    """So that it is the control of BMF with that level alone."""
    setting = small(algorithm="mf_ac_plus", levels=levels)
    first = groups.init_groups(setting, AGENTS, ACTIONS, SIZE)
    new = groups.update_groups(None, setting, first, 0, X, TAKEN, ALIVE, KEY)
    mean = np.eye(ACTIONS)[np.asarray(TAKEN)][np.asarray(ALIVE)].mean(0)
    found = groups.mean_field_input({}, setting, new)
    for vectors, keep in zip(found, kept, strict=True):
        for row in np.asarray(vectors)[np.asarray(ALIVE)]:
            np.testing.assert_allclose(row, keep * mean, atol=1e-6)


SETTINGS = {
    "official": small("official"),
    "attention": small(),
    "state": small(attention_key="state"),
    "positive": small(inter="cosine_positive", mf_form="mixed"),
    "observation": small(cluster_on="observation", inter="cosine", group_interval=1000),
    "random": small(algorithm="bmf_random"),
    "mf_ac_plus": small(algorithm="mf_ac_plus"),
    "mf_ac": small(algorithm="mf_ac"),
    "ac": small(algorithm="ac"),
}


# the groups are made alike in these: only what is read of them differs
LIKE = {"positive": "attention", "mf_ac": "mf_ac_plus"}
slow = lambda *names: [pytest.param(n, marks=pytest.mark.slow) for n in names]
NAMES = [
    *slow("state", "observation", "random"),
    "official",
    "attention",
    "positive",
    "mf_ac_plus",
    "mf_ac",
    "ac",
]


def played(name):
    return episodes(SETTINGS[LIKE.get(name, name)])


def vectors_of(setting, batch):
    return inputs(params_of(setting)[0], setting, batch.groups)


@pytest.mark.parametrize("name", NAMES)
def test_mean_fields_are_zero_at_first_and_distributions_over_actions_afterwards(name):
    setting, batch = SETTINGS[name], played(name)
    mask = np.asarray(batch.mask)
    found = vectors_of(setting, batch)
    assert len(found) == {"ac": 0, "mf_ac": 1, "official": 1, "positive": 1}.get(name, 2)
    for mu in map(np.asarray, found):
        assert np.isfinite(mu).all() and not mu[0].any()
        np.testing.assert_allclose(mu[1:].sum(-1)[mask[1:]], 1, atol=1e-4)


@pytest.mark.parametrize("name", ["attention", "mf_ac"])
def test_the_state_after_the_last_step_serves_the_bootstrap(name):
    setting, batch = SETTINGS[name], played(name)
    for mu in inputs(params_of(setting)[0], setting, batch.final_groups):
        living = np.asarray(batch.alive_after[-1])
        np.testing.assert_allclose(np.asarray(mu).sum(-1)[living], 1, atol=1e-4)


def test_a_step_sees_the_actions_of_the_step_before():
    setting, batch = SETTINGS["mf_ac"], played("mf_ac")
    (mu,) = vectors_of(setting, batch)
    done = np.eye(ACTIONS)[np.asarray(batch.action)]
    for t in range(1, STEPS):
        for e in range(ENVS):
            # who lived at the start of step t - 1
            lived = np.asarray(batch.alive_after[t - 2, e]) if t > 1 else np.ones(AGENTS, bool)
            right = done[t - 1, e][lived].mean(0)
            for i in np.flatnonzero(batch.mask[t, e]):
                np.testing.assert_allclose(mu[t, e, i], right, rtol=1e-5)


@pytest.mark.parametrize("name", ["official", "attention", *slow("random")])
def test_groups_are_kept_by_survivors_between_regroupings(name):
    batch = episodes(SETTINGS[name])
    labels = np.asarray(batch.groups.labels[:, 0])  # labels[t] were made at t - 1
    alive_after = np.asarray(batch.alive_after)[:, 0]
    assert (labels[0] == -1).all() and (labels[1] >= 0).all()
    for t in (2, 4):  # made at steps 1 and 3; groups are made anew at 0, 2 and 4
        lived = alive_after[t - 2]
        assert (~lived).sum() > 0 and lived.sum() > SETTINGS[name].groups
        np.testing.assert_array_equal(labels[t][lived], labels[t - 1][lived])
        assert (labels[t][~lived] == -1).all()


@pytest.mark.slow
def test_no_interval_groups_once():
    labels = np.asarray(episodes(SETTINGS["observation"]).groups.labels[:, 0])
    for t in range(2, STEPS):
        lived = labels[t] >= 0
        np.testing.assert_array_equal(labels[t][lived], labels[1][lived])


def test_random_groups_change_at_each_regrouping_and_only_then():
    setting = small(algorithm="bmf_random", group_interval=2)
    x = jnp.zeros((AGENTS, SIZE))
    encoder = params_of(setting)[1]
    seen, before = [], groups.init_groups(setting, AGENTS, ACTIONS)
    for t in range(6):
        before = update(encoder, setting, before, jnp.int32(t), x, TAKEN, ALIVE, jax.random.key(t))
        seen.append(tuple(np.asarray(before.labels).tolist()))
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[4] == seen[5]
    assert len(set(seen)) == 3
    assert all(0 <= label < setting.groups for labels in seen for label in labels)


@pytest.mark.parametrize("name", ["official", "attention", "random"])
def test_as_many_agents_as_groups_or_fewer_are_a_group_each(name):
    setting = SETTINGS[name]
    policy, encoder = params_of(setting)
    alive = jnp.array([False, True, False, False, True, True, False])
    before = state(labels=(2, 2, 2, 0, 0, 0, 0), groups_=3, keys=jnp.zeros((3, 3)))
    new = update(encoder, setting, before, 1, X, TAKEN, alive, KEY)
    np.testing.assert_array_equal(new.labels, [-1, 0, -1, -1, 1, 2, -1])
    np.testing.assert_array_equal(new.actions, np.eye(ACTIONS)[[1, 4, 4]])
    if (
        name == "official"
    ):  # mu_i = sum_j cos(z_i, z_j) e_aj / sum_j cos(z_i, z_j), from the samples of z
        z = np.float64(groups.latents(encoder, setting, X, TAKEN, jax.random.split(KEY)[0]))[[1, 4, 5]]  # fmt: skip
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        w = unit @ unit.T
        right = w / w.sum(1, keepdims=True) @ np.eye(ACTIONS)[[1, 4, 4]]
        (mu,) = inputs(policy, setting, new)
        np.testing.assert_allclose(np.asarray(mu)[[1, 4, 5]], right, rtol=1e-3, atol=1e-5)


def test_group_states_are_means_over_agents_alive_at_the_start_of_the_step():
    setting = SETTINGS["attention"]
    encoder = params_of(setting)[1]
    alive = ALIVE.at[jnp.array([0, 5])].set(False)
    before = state(labels=(0, 0, 1, 2, 2, 2, 0), groups_=3, keys=jnp.zeros((3, 3)))
    new = update(encoder, setting, before, 1, X, TAKEN, alive, KEY)
    np.testing.assert_array_equal(new.labels, [-1, 0, 1, 2, 2, -1, 0])
    mean = np.asarray(vae.encode(encoder, setting, X, TAKEN)[0])
    done = np.eye(ACTIONS)[np.asarray(TAKEN)]
    for k, members in enumerate(([1, 6], [2], [3, 4])):
        np.testing.assert_allclose(new.keys[k], mean[members].mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new.actions[k], done[members].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(new.count, [2, 1, 2])


@pytest.mark.slow
def test_groups_may_be_compared_by_their_mean_observation():
    setting = SETTINGS["state"]
    before = state(labels=(0, 0, 1, 2, 2, 2, 0), groups_=3, keys=jnp.zeros((3, SIZE)))
    new = update(params_of(setting)[1], setting, before, 1, X, TAKEN, ALIVE.at[0].set(False), KEY)
    np.testing.assert_allclose(new.keys[0], np.asarray(X)[[1, 6]].mean(0), rtol=1e-5, atol=1e-6)


def test_what_the_dead_hold_does_not_matter():
    setting = SETTINGS["attention"]
    encoder = params_of(setting)[1]
    alive = ALIVE.at[2].set(False)
    first = groups.init_groups(setting, AGENTS, ACTIONS)
    plain = update(encoder, setting, first, 0, X, TAKEN, alive, KEY)
    junk = update(encoder, setting, first, 0, X.at[2].set(jnp.nan), TAKEN.at[2].set(3), alive, KEY)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(junk)):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(AGENTS)))
def test_mean_fields_follow_agents_that_change_places(order):
    order = np.array(order)
    before = state(labels=(0, 0, 1, 2, 2, -1, 0), groups_=3, keys=jnp.zeros((3, 3)))
    moved = before._replace(labels=before.labels[order])
    alive = before.labels >= 0
    setting = SETTINGS["attention"]
    policy, encoder = params_of(setting)
    run = lambda s, *given: inputs(policy, setting, update(encoder, setting, s, 1, *given, KEY))
    plain = run(before, X, TAKEN, alive)
    other = run(moved, X[order], TAKEN[order], alive[order])
    for a, b in zip(plain, other):
        np.testing.assert_allclose(np.asarray(a)[order], b, rtol=1e-4, atol=1e-6)


def test_samples_are_clustered_officially_and_means_otherwise():
    for name, differ in (("official", True), ("attention", False)):
        setting = SETTINGS[name]
        encoder = params_of(setting)[1]
        draws = [groups.latents(encoder, setting, X, TAKEN, jax.random.key(i)) for i in (0, 1)]
        assert differ == bool(np.any(np.asarray(draws[0]) != np.asarray(draws[1])))


def test_vectors_and_their_gradient_are_finite_with_empty_groups_and_equal_latents():
    empty = state(jnp.zeros((4, 3)))
    setting = small(groups=4)
    policy = params_of(setting)[0]
    slope = jax.jit(jax.grad(lambda p: groups.mean_field_input(p, setting, empty)[1][:, 0].sum()))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope(policy)))
    through = jax.jit(jax.grad(lambda k: groups.cosine(k).sum()))
    assert np.isfinite(through(HAND)).all()


def test_k_means_runs_only_in_steps_that_regroup_also_where_environments_are_mapped():
    setting = small()
    encoder = params_of(setting)[1]
    first = groups.init_groups(setting, AGENTS, ACTIONS)
    one = functools.partial(groups.update_groups, encoder, setting)
    many = jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0))
    shapes = (first, jnp.int32(0), X[None], TAKEN[None], ALIVE[None], jax.random.split(KEY, 1))
    outer = [e.primitive.name for e in jax.make_jaxpr(many)(*shapes).eqns]
    assert "cond" in outer and "while" not in outer


def test_more_groups_than_agents_and_missing_parts_are_refused():
    with pytest.raises(UserError, match="groups=9 of a team of 7 agents; use 1 to 7"):
        groups.init_groups(small(groups=9), AGENTS, ACTIONS)
    assert groups.init_groups(small(groups=9, algorithm="ac"), AGENTS, ACTIONS).count.shape == (1,)
    with pytest.raises(UserError, match="observation_size=0 with attention_key='state'"):
        groups.init_groups(SETTINGS["state"], AGENTS, ACTIONS)
    with pytest.raises(UserError, match="algorithm='bmf' groups by latents; give it a VAE"):
        groups.latents(None, small(), X, TAKEN, KEY)


def test_actions_may_be_vectors():
    setting = small(algorithm="mf_ac_plus", exclude_self=True)
    first = groups.init_groups(setting, AGENTS, 2)
    done = jnp.asarray(rng.normal(size=(AGENTS, 2)), jnp.float32)
    new = groups.update_groups(None, setting, first, 0, X, done, ALIVE, KEY)
    intra, inter = groups.mean_field_input({}, setting, new)
    np.testing.assert_allclose(intra[0], np.asarray(done)[1:].mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(intra, inter)


def test_observations_join_view_and_features_row_by_row():
    view = jnp.arange(18.0).reshape(1, 3, 3, 2)
    x = networks.observation(small(), view, jnp.full((1, 2), 7.0))
    np.testing.assert_array_equal(x, [[*range(18), 7, 7]])
