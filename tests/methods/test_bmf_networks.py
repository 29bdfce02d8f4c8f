"""Actor, critic and attention of BMF and the baselines: sizes, numbers by hand, what they read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmf_small import ACTIONS, FEATURES, VIEW, params_of, small

from jaxrepro.methods.bmf import networks
from jaxrepro.methods.bmf.layers import Dense
from jaxrepro.methods.bmf.setting import of_preset

rng = np.random.default_rng(0)
VIEWS = jnp.asarray(rng.normal(size=(4, *VIEW)), jnp.float32)
READ = jnp.asarray(rng.normal(size=(4, FEATURES)), jnp.float32)
both_of = jax.jit(networks.policy_and_value, static_argnums=1)
MU = tuple(jnp.asarray(rng.dirichlet(np.ones(ACTIONS), 4), jnp.float32) for _ in range(2))


def sizes(setting):
    make = lambda key: networks.init_policy(key, setting, (13, 13, 7), 34, 21)
    shapes = jax.eval_shape(make, jax.random.key(0))
    return {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in shapes.items()}


# Counted on the official code; the bilevel form adds a tower (21 64 + 64 + 64 32 + 32 = 3,488) and what reads it:
# 32 512 = 16,384 in the actor, 32 256 = 8,192 in the critic.
def test_networks_have_the_size_of_the_official_ones():
    official = {"base": 315_552, "actor": 289_813, "critic": 139_777}
    assert sizes(of_preset("official")) == official
    assert sizes(of_preset("official", algorithm="mf_ac_plus")) == official
    bilevel = {"base": 319_040, "actor": 306_197, "critic": 147_969}
    assert sizes(of_preset("fixed")) == bilevel | {"attention": 2 * 32 * 32}
    assert sizes(of_preset("fixed", algorithm="mf_ac_plus")) == bilevel
    assert sizes(of_preset("fixed", inter="cosine")) == bilevel
    state = sizes(of_preset("fixed", attention_key="state"))
    assert state == bilevel | {"attention": 2 * 32 * 1217}


# From the layers of arXiv:1802.05438's code: view 1183 256 + 256, features 34 256 + 256; AC: 512 512 + 512,
# 512 21 + 21, 512 + 1; MF-AC: 512 512 + 512, 512 21 + 21; tower 3,488, 544 256 + 256, 256 + 1.
def test_baselines_have_the_size_of_their_authors_networks():
    assert sizes(of_preset("fixed", algorithm="ac")) == {"base": 574_720, "actor": 10_773, "critic": 513}  # fmt: skip
    assert sizes(of_preset("fixed", algorithm="mf_ac")) == {
        "base": 312_064, "actor": 273_429, "critic": 3_488 + 139_776 + 1,
    }  # fmt: skip


def test_weights_and_biases_are_uniform_within_one_over_root_fan_in():
    init = lambda key: Dense(300).init(key, jnp.zeros(256))["params"]
    for layer in map(jax.jit(init), jax.random.split(jax.random.key(1), 3)):
        bound = layer["kernel"].shape[0] ** -0.5
        assert bound == 1 / 16
        for x in layer.values():
            assert 0.95 * bound < np.abs(x).max() <= bound
            # of 300 numbers the mean of |u| / bound has a standard error of 0.017
            np.testing.assert_allclose(np.abs(x).mean(), bound / 2, rtol=0.15)


def by_hand(p, vectors, names):
    relu = lambda x: np.maximum(x, 0)
    lin = lambda layer, x: x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    tower = lambda t, mu: relu(lin(t["out"], relu(lin(t["hidden"], np.float64(mu)))))
    parts = [np.float64(VIEWS).reshape(4, -1), np.float64(READ)]
    h = [relu(lin(p["base"][n], x)) for n, x in zip(("view", "features"), parts)]
    h = np.concatenate(h + [tower(p["base"][n], mu) for n, mu in zip(names, vectors)], -1)
    return relu, lin, tower, h


@pytest.mark.parametrize("preset", ["official", "fixed"])
def test_policy_and_value_equal_the_formulas(preset):
    setting = small(preset)
    p = params_of(setting)[0]
    vectors = MU[: len(setting.towers)]
    relu, lin, _, h = by_hand(p, vectors, setting.towers)
    logits = lin(p["actor"]["logits"], relu(lin(p["actor"]["hidden"], h)) / 0.1)
    value = lin(p["critic"]["value"], relu(lin(p["critic"]["hidden"], h)))[:, 0]
    found = both_of(p, setting, VIEWS, READ, vectors)
    np.testing.assert_allclose(found[0], logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1], value, rtol=1e-4, atol=1e-5)
    apart = jax.jit(lambda *x: (networks.policy(p, setting, *x), networks.value(p, setting, *x)))
    for a, b in zip(apart(VIEWS, READ, vectors), found):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_ac_and_mf_ac_equal_their_formulas_and_mf_ac_has_no_mean_field_in_the_actor():
    for name in ("ac", "mf_ac"):
        setting = small(algorithm=name)
        p = params_of(setting)[0]
        relu, lin, tower, h = by_hand(p, (), ())
        vectors = MU[:1] if name == "mf_ac" else ()
        if name == "ac":
            deep = relu(lin(p["base"]["hidden"], h))
            value = lin(p["critic"]["value"], deep)[:, 0]
        else:
            deep = relu(lin(p["actor"]["hidden"], h))
            both = np.concatenate([h, tower(p["critic"]["mean_field"], MU[0])], -1)
            value = lin(p["critic"]["value"], relu(lin(p["critic"]["hidden"], both)))[:, 0]
        logits = lin(p["actor"]["logits"], deep / 0.1)
        found = both_of(p, setting, VIEWS, READ, vectors)
        np.testing.assert_allclose(found[0], logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1], value, rtol=1e-4, atol=1e-5)


def test_masked_ids_are_read_by_nobody():
    setting = small(mask_id_features=True)
    p = params_of(setting)[0]
    other = READ.at[:, :10].set(7.0)
    for a, b in zip(*(both_of(p, setting, VIEWS, x, MU) for x in (READ, other))):
        np.testing.assert_array_equal(a, b)
    a, b = (networks.observation(setting, VIEWS, x) for x in (READ, other))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[:, 18 + 10 :], READ[:, 10:])
    seen = networks.observation(small(), VIEWS, READ)
    np.testing.assert_array_equal(seen, np.concatenate([np.asarray(VIEWS).reshape(4, -1), READ], 1))


def test_probabilities_are_clipped_and_nan_is_hidden_only_officially():
    logits = jnp.array([[0.0, 200.0, -200.0], [jnp.nan, 0.0, 0.0]])
    official = networks.probabilities(small("official"), logits)
    np.testing.assert_allclose(official[0], [1e-10, 1, 1e-10])
    np.testing.assert_allclose(official[1], 1e-10)
    assert np.isnan(networks.probabilities(small(), logits)[1]).all()


def test_actions_are_drawn_from_the_policy():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    drawn = networks.draw(small(), jnp.broadcast_to(logits, (20_000, 3)), jax.random.key(0))
    # three standard errors of a share of 0.5
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=3) / 20_000, [0.5, 0.3, 0.2], atol=0.011
    )


@pytest.mark.slow
def test_parameters_are_drawn_anew_for_each_part_and_each_key():
    setting = small()
    make = jax.jit(lambda key: networks.init_policy(key, setting, (1, 1, 2), 2, 2))
    one, two, again = (make(jax.random.key(i)) for i in (0, 1, 0))
    same = lambda a, b: [bool((x == y).all()) for x, y in zip(*map(jax.tree.leaves, (a, b)))]
    assert all(same(one, again)) and not any(same(one, two))
    towers = one["base"]["intra"], one["base"]["inter"]
    assert not any(same(*towers))


def test_attention_is_a_softmax_over_groups_with_members():
    setting = small()
    p = params_of(setting)[0]
    states = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    occupied = jnp.array([True, False, True])
    q, k = (np.float64(states) @ np.float64(p["attention"][n]["kernel"]) for n in ("query", "key"))
    right = np.exp(q @ k.T / np.sqrt(4)) * np.asarray(occupied)
    right /= right.sum(1, keepdims=True)
    found = jax.jit(lambda *x: networks.attention_weights(p, setting, *x))(states, occupied)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-7)


def test_attention_over_no_group_is_zero_with_a_finite_gradient():
    setting = small()
    p = params_of(setting)[0]
    f = lambda p: networks.attention_weights(p, setting, jnp.zeros((3, 3)), jnp.zeros(3, bool))
    weights, slope = jax.jit(lambda p: (f(p), jax.grad(lambda p: f(p).sum())(p)))(p)
    assert not weights.any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
