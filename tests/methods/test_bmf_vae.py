"""The autoencoder of BMF: losses by hand, three targets, two reductions, collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bmf_small import ACTIONS, SIZE, params_of, small

from jaxrepro.methods.bmf import training, vae
from jaxrepro.methods.bmf.setting import of_preset
from jaxrepro.methods.bmf.vae import VAEBatch

ROWS = 8
TARGETS = ("state", "state_action", "state_action_value")
KEY = jax.random.key(0)
sums = jax.jit(vae.loss_sums, static_argnums=1)
whole = jax.jit(vae.vae_loss, static_argnums=1)
update = jax.jit(training.update_vae, static_argnums=1, static_argnames="micro_batches")
rng = np.random.default_rng(0)
BATCH = VAEBatch(
    jnp.asarray(rng.normal(size=(ROWS, SIZE)), jnp.float32),
    jnp.asarray(rng.integers(0, ACTIONS, ROWS), jnp.int32),
    *(jnp.asarray(rng.normal(size=ROWS), jnp.float32) for _ in range(2)),
    jnp.arange(ROWS) != 2,
)
NOISE = jnp.asarray(rng.normal(size=(ROWS, 3)), jnp.float32)


def test_the_official_vae_has_the_official_size():
    make = lambda key: vae.init_vae(key, of_preset("official"), 1217, 21)
    shapes = jax.eval_shape(make, KEY)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 1_297_665
    full = jax.eval_shape(lambda key: vae.init_vae(key, of_preset("fixed"), 1217, 21), KEY)
    assert full["encoder"]["hidden"]["kernel"].shape == (1238, 512)
    assert full["decoder"]["out"]["kernel"].shape == (512, 1238)
    assert full["value"]["hidden"]["kernel"].shape == (1217 + 32, 256)


def test_the_kl_of_the_prior_is_zero_and_others_equal_the_integral():
    assert not vae.kl_to_prior(jnp.zeros(3), jnp.zeros(3)).any()
    m, s2 = 0.7, 0.3
    grid = np.linspace(-8, 8, 20_001)
    log_q = -((grid - m) ** 2) / (2 * s2) - 0.5 * np.log(2 * np.pi * s2)
    log_p = -(grid**2) / 2 - 0.5 * np.log(2 * np.pi)
    right = (np.exp(log_q) * (log_q - log_p)).sum() * (grid[1] - grid[0])
    found = vae.kl_to_prior(jnp.array([m]), jnp.log(jnp.array([s2])))
    np.testing.assert_allclose(found, right, rtol=1e-5)


def by_hand(setting, p):
    """L over the unmasked rows, in numpy."""
    relu = lambda x: np.maximum(x, 0)
    leaky = lambda x: np.where(x > 0, x, 0.01 * x)
    lin = lambda layer, x: x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    keep = np.asarray(BATCH.mask)
    x, noise = np.float64(BATCH.x)[keep], np.float64(NOISE)[keep]
    r, after = np.float64(BATCH.reward)[keep], np.float64(BATCH.next_value)[keep]
    action = np.asarray(BATCH.action)[keep]
    acted = setting.vae_target != "state"
    e, n = np.eye(ACTIONS)[action], len(x)
    h = relu(lin(p["encoder"]["hidden"], np.concatenate([x, e], 1) if acted else x))
    m, log_s2 = lin(p["encoder"]["mean"], h), lin(p["encoder"]["log_variance"], h)
    z = m + np.exp(log_s2 / 2) * noise
    out = lin(p["decoder"]["out"], leaky(lin(p["decoder"]["hidden"], z)))
    wrong = (out[:, :SIZE] - x) ** 2
    kl = 0.5 * (np.exp(log_s2) + m**2 - 1 - log_s2)
    if setting.vae_reduction == "official":
        loss = wrong.mean() + kl.sum()
    else:
        loss = (wrong.sum() + kl.sum()) / n
    if acted:
        logits = out[:, SIZE:]
        lp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        loss += -lp[np.arange(n), action].mean()
    if setting.vae_target == "state_action_value":
        f = lin(p["value"]["out"], relu(lin(p["value"]["hidden"], np.concatenate([x, z], 1))))[:, 0]
        found = (f - r) / (0.95 if setting.r2_divide_gamma else 1)
        loss += ((found - after) ** 2).mean()
    return loss


@pytest.mark.parametrize(
    "target, reduction, divide",
    [(t, r, True) for t in TARGETS for r in ("official", "fixed")] + [(TARGETS[2], "fixed", False)],
)
def test_losses_equal_the_formulas(target, reduction, divide):
    setting = small(vae_target=target, vae_reduction=reduction, r2_divide_gamma=divide)
    p = params_of(setting)[1]
    with jax.disable_jit():  # to compile twelve programs would take longer
        total, n, aux = vae.loss_sums(p, setting, BATCH, NOISE, jnp.float32(ROWS - 1))
    assert n == ROWS - 1
    np.testing.assert_allclose(total / n, by_hand(setting, p), rtol=1e-5)
    assert ("action_nll" in aux) == (target != "state")
    assert ("value_error" in aux) == (target == "state_action_value")


def test_masked_rows_change_nothing_whatever_they_hold():
    setting = small()
    p = params_of(setting)[1]
    junk = BATCH._replace(x=BATCH.x.at[2].set(jnp.nan), reward=BATCH.reward.at[2].set(jnp.inf))
    slope = jax.jit(jax.value_and_grad(lambda p, b: sums(p, setting, b, NOISE, 7.0)[0]))
    for a, b in zip(jax.tree.leaves(slope(p, BATCH)), jax.tree.leaves(slope(p, junk))):
        np.testing.assert_array_equal(a, b)


def test_the_official_kl_gradient_grows_with_the_batch_and_the_fixed_one_does_not():
    twice = VAEBatch(*(jnp.concatenate([x, x]) for x in BATCH))
    for preset, factor in (("official", 2.0), ("fixed", 1.0)):
        # what beta adds is the gradient of the KL alone
        on, off = (small(preset, vae_target="state", beta=b) for b in (1.0, 0.0))
        mean = lambda s, p, b: jnp.divide(*sums(p, s, b, jnp.zeros((len(b.mask), 3)), b.mask.sum().astype(jnp.float32))[:2])  # fmt: skip
        kl = lambda p, b, on=on, off=off, mean=mean: mean(on, p, b) - mean(off, p, b)
        slope = jax.jit(jax.grad(kl))
        p = params_of(on)[1]
        one, two = (np.asarray(slope(p, b)["encoder"]["mean"]["bias"]) for b in (BATCH, twice))
        np.testing.assert_allclose(two, factor * one, rtol=1e-3, atol=1e-6)
        assert np.abs(one).min() > 1e-4


def test_while_beta_rises_the_kl_counts_by_its_share():
    setting = small()
    p = params_of(setting)[1]
    with jax.disable_jit():
        loss = lambda s, *w: float(vae.loss_sums(p, s, BATCH, NOISE, jnp.float32(7), *w)[0])
        assert loss(setting, 0.25) == pytest.approx(loss(small(beta=0.25)), rel=1e-6)
        assert loss(setting, 1.0) == loss(setting)
        assert loss(setting, 0.25) != loss(setting)


def test_no_gradient_flows_into_the_value_that_is_matched():
    setting = small()
    p = params_of(setting)[1]
    f = lambda after: sums(p, setting, BATCH._replace(next_value=after), NOISE, 7.0)[0]
    assert not jax.jit(jax.grad(f))(BATCH.next_value).any()


@pytest.mark.slow
def test_micro_batches_are_the_same_update():
    setting = small(vae_reduction="official")
    state = training.vae_state(params_of(setting)[1], setting)
    whole_batch, split = (update(state, setting, BATCH, KEY, micro_batches=n) for n in (1, 4))
    for a, b in zip(jax.tree.leaves(whole_batch), jax.tree.leaves(split)):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_the_monitor_counts_latents_that_vary_over_agents():
    mean = np.random.default_rng(1).normal(size=(500, 3)) * [1.0, 0.2, 0.001] + [0, 3, 0]
    found = vae.monitor({"latent": jnp.asarray(mean.mean(0)), "latent_square": jnp.asarray((mean**2).mean(0)), "loss": jnp.ones(())})  # fmt: skip
    assert found["active_units"] == 2 and found["loss"] == 1
    np.testing.assert_allclose(found["spread"], mean.var(0).mean(), rtol=1e-3)


def scenes(n, size, seed=0):
    """Structured observations: a few crowds of ones on zeros, noise in no entry."""
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(n, 3))
    row = np.linspace(0, 1, size)
    waves = np.stack([np.sin(7 * row), np.cos(5 * row), row])
    return jnp.asarray(place @ waves > 0.5, jnp.float32)


@pytest.mark.slow
def test_the_official_reduction_collapses_and_the_fixed_one_does_not():
    """256 binary scenes of 60 entries, 250 steps: bounds of the specification, on synthetic scenes."""
    x = scenes(256, 60)
    zero = jnp.zeros(256)
    batch = VAEBatch(x, zero.astype(jnp.int32), zero, zero, jnp.ones(256, bool))
    found = {}
    for preset in ("official", "fixed"):
        setting = of_preset(preset, vae_target="state", vae_hidden=32, latent=8, vae_lr=3e-3)
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda k, s=setting: vae.init_vae(k, s, 60, 2), KEY)
        draw = lambda s, rng=rng: jnp.asarray(rng.uniform(-0.15, 0.15, s.shape), jnp.float32)
        state = training.vae_state(jax.tree.map(draw, shapes), setting)
        step = lambda s, i, setting=setting: training.update_vae(s, setting, batch, jax.random.fold_in(KEY, i))  # fmt: skip
        metrics = jax.jit(lambda s, f=step: jax.lax.scan(f, s, jnp.arange(250))[1])(state)
        found[preset] = {k: float(v[-1]) for k, v in metrics.items()}
    bad, good = found["official"], found["fixed"]
    assert bad["kl_per_dim"] < 1e-3 and bad["active_units"] == 0 and bad["spread"] < 1e-3
    np.testing.assert_allclose(bad["variance"], 1, atol=0.05)
    assert good["kl_per_dim"] > 0.02 and good["active_units"] >= 3
    assert good["reconstruction"] < 0.5 * bad["reconstruction"]


def test_samples_are_mean_plus_noise_times_deviation():
    mean, log_s2 = jnp.array([1.0, -2.0]), jnp.log(jnp.array([4.0, 0.25]))
    found = vae.sample(mean, log_s2, jnp.array([3.0, 2.0]))
    np.testing.assert_allclose(found, [1 + 2 * 3, -2 + 0.5 * 2], rtol=1e-6)


def test_vae_loss_draws_its_noise_from_the_key_and_reports_the_monitor():
    setting = small()
    p = params_of(setting)[1]
    one, again, other = (whole(p, setting, BATCH, jax.random.key(i)) for i in (0, 0, 1))
    assert one[0] == again[0] != other[0]
    names = {"reconstruction", "kl_per_dim", "variance", "active_units", "spread", "action_nll", "value_error"}  # fmt: skip
    assert set(one[1]) == names
    keep = np.asarray(BATCH.mask)
    m, log_s2 = (np.float64(v)[keep] for v in vae.encode(p, setting, BATCH.x, BATCH.action))
    right = (0.5 * (np.exp(log_s2) + m**2 - 1 - log_s2)).mean()
    np.testing.assert_allclose(one[1]["kl_per_dim"], right, rtol=1e-5)
