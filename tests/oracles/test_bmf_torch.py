"""BMF's official form in torch, written from its equations: networks, losses, gradients and updates are the same."""

import pytest

torch = pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np

from jaxrepro.methods.bmf import groups, networks, objective, training, vae
from jaxrepro.methods.bmf.groups import GroupState
from jaxrepro.methods.bmf.objective import Trajectories
from jaxrepro.methods.bmf.setting import of_preset
from jaxrepro.methods.bmf.vae import VAEBatch

pytestmark = pytest.mark.oracle
VIEW, FEATURES, ACTIONS = (13, 13, 7), 34, 21
STEPS, ENVS, AGENTS = 5, 2, 6
OFFICIAL = of_preset("official")
F = torch.nn.functional


class Policy(torch.nn.Module):
    """Layers by the names of our parameters; towers as many as there are mean fields."""

    def __init__(self, towers):
        super().__init__()
        linear, wide = torch.nn.Linear, 512 + 32 * len(towers)
        self.towers = towers
        self.base = torch.nn.ModuleDict({"view": linear(1183, 256), "features": linear(34, 256)})
        for name in towers:
            self.base[name] = torch.nn.ModuleDict({"hidden": linear(21, 64), "out": linear(64, 32)})
        self.actor = torch.nn.ModuleDict({"hidden": linear(wide, 512), "logits": linear(512, 21)})
        self.critic = torch.nn.ModuleDict({"hidden": linear(wide, 256), "value": linear(256, 1)})

    def forward(self, view, features, *fields):
        h = [F.relu(self.base["view"](view.flatten(1))), F.relu(self.base["features"](features))]
        for name, mu in zip(self.towers, fields):
            h.append(F.relu(self.base[name]["out"](F.relu(self.base[name]["hidden"](mu)))))
        h = torch.cat(h, 1)
        d = F.relu(self.actor["hidden"](h))
        pi = F.softmax(self.actor["logits"](d / 0.1), 1)
        pi = torch.clamp(torch.nan_to_num(pi, nan=0.0), 1e-10, 1 - 1e-10)
        return pi, self.critic["value"](F.relu(self.critic["hidden"](h)))[:, 0]


class Autoencoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.encoder = torch.nn.ModuleDict({"hidden": linear(1217, 512), "mean": linear(512, 32), "log_variance": linear(512, 32)})  # fmt: skip
        self.decoder = torch.nn.ModuleDict({"hidden": linear(32, 512), "out": linear(512, 1217)})

    def forward(self, x, noise):
        h = F.relu(self.encoder["hidden"](x))
        m, log_s2 = self.encoder["mean"](h), self.encoder["log_variance"](h)
        z = m + torch.exp(log_s2 / 2) * noise
        return self.decoder["out"](F.leaky_relu(self.decoder["hidden"](z), 0.01)), m, log_s2


def leaves(params, prefix=""):
    """{"base.view.weight": array} of a tree of kernels and biases, kernels turned as torch has them."""
    found = {}
    for name, x in params.items():
        if isinstance(x, dict):
            found |= leaves(x, f"{prefix}{name}.")
        else:
            found[prefix + {"kernel": "weight", "bias": "bias"}[name]] = np.asarray(x).T
    return found


def filled(module, params):
    module.load_state_dict({k: torch.tensor(v.copy()) for k, v in leaves(params).items()})
    return module


def same_leaves(module, params, of=lambda p: p, **tolerance):
    right = leaves(params)
    for name, p in module.named_parameters():
        np.testing.assert_allclose(of(p).detach(), right[name], err_msg=name, **tolerance)


rng = np.random.default_rng(0)
DEATH = np.array([[1, 3, 9, 9, 9, 0], [9, 9, 2, 9, 9, 9]])
MASK = np.arange(STEPS)[:, None, None] <= DEATH
AFTER = np.arange(STEPS)[:, None, None] < DEATH


def episodes(setting):
    """Random episodes with groups of hand-made labels."""
    normal = lambda *s: rng.normal(size=s).astype(np.float32)
    lead = (STEPS + 1, ENVS)
    labels = rng.integers(0, 4, (*lead, AGENTS)).astype(np.int32)
    action = rng.integers(0, ACTIONS, (STEPS, ENVS, AGENTS)).astype(np.int32)
    done = np.eye(ACTIONS, dtype=np.float32)[rng.integers(0, ACTIONS, (*lead, AGENTS))]
    means, count = jax.vmap(jax.vmap(lambda d, l: groups.group_means(d, l, 4)))(
        jnp.asarray(done), jnp.asarray(labels)
    )
    state = GroupState(jnp.asarray(labels), means, jnp.asarray(normal(*lead, 4, 32)), count, None)
    view, features = rng.random((*lead, AGENTS, *VIEW)).astype(np.float32), normal(*lead, AGENTS, FEATURES)  # fmt: skip
    cut = lambda x, s: jax.tree.map(lambda y: jnp.asarray(y[s]), x)
    return Trajectories(
        cut(view, slice(-1)), cut(features, slice(-1)), jnp.asarray(action),
        jnp.asarray(normal(STEPS, ENVS, AGENTS)), jnp.asarray(MASK), jnp.asarray(AFTER),
        cut(state, slice(-1)), cut(view, -1), cut(features, -1), cut(state, -1),
    )  # fmt: skip


def cosine_fields(state):
    """mu of each agent in torch: cosine over its row sum, group means, labels."""
    keys, means = torch.tensor(np.asarray(state.keys)), torch.tensor(np.asarray(state.actions))
    count = torch.tensor(np.asarray(state.count))
    keys = keys * (count > 0)[..., None]
    cos = F.cosine_similarity(keys[..., :, None, :], keys[..., None, :, :], dim=-1)
    w = torch.nan_to_num(cos / cos.sum(-1, keepdim=True))
    mixed = w @ means
    labels = torch.tensor(np.asarray(state.labels)).long()
    take = lambda x: torch.gather(x, -2, labels[..., None].expand(*labels.shape, ACTIONS))
    return take(means), take(mixed)


def loss_of(policy, batch, fields, bootstrap):
    """Loss over lists of steps, agent by agent, as the official code gathers them; `fixed`: with its own ends."""
    view, features, action, reward = (torch.tensor(np.asarray(getattr(batch, k))) for k in ("view", "features", "action", "reward"))  # fmt: skip
    final_view, final_features = (torch.tensor(np.asarray(x)) for x in (batch.final_view, batch.final_features))  # fmt: skip
    rows = []
    for e in range(ENVS):
        for i in range(AGENTS):
            t = np.flatnonzero(MASK[:, e, i])
            mu = [f[t, e, i] for f in fields[0]]
            pi, v = policy(view[t, e, i], features[t, e, i], *mu)
            with torch.no_grad():
                if bootstrap == "official":
                    r = v[-1]
                elif AFTER[t[-1], e, i]:
                    r = policy(final_view[e, i][None], final_features[e, i][None], *[f[e, i][None] for f in fields[1]])[1][0]  # fmt: skip
                else:
                    r = torch.tensor(0.0)
                target = []
                for step in reversed(t):
                    r = reward[step, e, i] + 0.95 * r
                    target.insert(0, r)
            rows.append((pi, v, torch.stack(target), action[t, e, i].long()))
    pi, v, target, action = (torch.cat(x) for x in zip(*rows))
    lp = torch.log(pi + 1e-6)
    advantage = (target - v).detach()
    taken = lp.gather(1, action[:, None])[:, 0]
    return -(advantage * taken).mean() + 0.1 * ((target - v) ** 2).mean() + 0.08 * (pi * lp).sum(1).mean()  # fmt: skip


@pytest.mark.parametrize("preset", ["official", "fixed"])
def test_policy_value_loss_gradients_and_one_update_equal_torchs(preset):
    setting = of_preset(preset, inter="cosine")
    params = networks.init_policy(jax.random.key(0), setting, VIEW, FEATURES, ACTIONS)
    batch = episodes(setting)
    policy = filled(Policy(setting.towers), params)
    pick = (lambda x: x[1:]) if preset == "official" else (lambda x: x)
    fields = pick(cosine_fields(batch.groups)), pick(cosine_fields(batch.final_groups))
    ours = groups.mean_field_input(params, setting, batch.groups)
    for a, b in zip(ours, fields[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    # the same vectors for both from here on: cosines over small sums magnify the last bit
    logits, value = networks.policy_and_value(params, setting, batch.view, batch.features, ours)
    flat = lambda x: torch.tensor(np.asarray(x)).flatten(0, 2)
    pi, v = policy(flat(batch.view), flat(batch.features), *map(flat, ours))
    np.testing.assert_allclose(networks.probabilities(setting, logits).reshape(-1, 21), pi.detach(), rtol=1e-3, atol=1e-7)  # fmt: skip
    np.testing.assert_allclose(value.reshape(-1), v.detach(), rtol=1e-4, atol=1e-5)

    tensors = lambda given: [torch.tensor(np.asarray(x)) for x in given]
    exact = tensors(ours), tensors(groups.mean_field_input(params, setting, batch.final_groups))
    right = loss_of(policy, batch, exact, preset)
    right.backward()
    f = lambda p: jnp.divide(*objective.loss(p, setting, batch)[:2])
    found, grads = jax.jit(jax.value_and_grad(f))(params)
    np.testing.assert_allclose(found, right.detach(), rtol=1e-4)
    same_leaves(policy, grads, of=lambda p: p.grad, rtol=1e-3, atol=1e-5)

    norms = []
    for part in (policy.base, policy.actor, policy.critic):
        norms.append(float(torch.nn.utils.clip_grad_norm_(part.parameters(), 0.5)))
    assert max(norms) > 0.5, "nothing would be clipped"
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    optimizer.step()
    quick = of_preset(preset, inter="cosine", lr=1e-3)
    state, metrics = jax.jit(lambda s: training.update_policy(s, quick, batch))(
        training.policy_state(params, quick)
    )
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(norms), rtol=1e-4)
    # Adam's first step is lr g / (|g| + 1e-8): where g is near 1e-8 its last bits decide
    sure = lambda g: np.abs(g) > 1e-5
    moved, before = leaves(state.params), leaves(params)
    for name, p in policy.named_parameters():
        keep = sure(p.grad.numpy())
        a, b = (x - before[name] for x in (moved[name], p.detach().numpy()))
        np.testing.assert_allclose(a[keep], b[keep], atol=2e-5, err_msg=name)
        assert np.abs(b[keep]).max() > 9e-4, name


def test_vae_loss_gradients_and_one_update_equal_torchs():
    params = vae.init_vae(jax.random.key(1), OFFICIAL, 1217, ACTIONS)
    n = 40
    x, noise = (rng.normal(size=(n, k)).astype(np.float32) for k in (1217, 32))
    zero = jnp.zeros(n)
    batch = VAEBatch(jnp.asarray(x), zero.astype(jnp.int32), zero, zero, jnp.ones(n, bool))
    f = lambda p: jnp.divide(*vae.loss_sums(p, OFFICIAL, batch, jnp.asarray(noise), jnp.float32(n))[:2])  # fmt: skip
    found, grads = jax.jit(jax.value_and_grad(f))(params)
    model = filled(Autoencoder(), params)
    out, m, log_s2 = model(torch.tensor(x), torch.tensor(noise))
    kl = 0.5 * torch.sum(log_s2.exp() + m**2 - 1 - log_s2)
    right = F.mse_loss(out, torch.tensor(x)) + kl
    right.backward()
    np.testing.assert_allclose(found, right.detach(), rtol=1e-5)
    same_leaves(model, grads, of=lambda p: p.grad, rtol=1e-3, atol=1e-6)
    # `update_vae` draws its own noise: torch gets the same
    key = jax.random.key(2)
    drawn = np.array(jax.random.normal(key, (n, 32)))
    model = filled(Autoencoder(), params)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    out, m, log_s2 = model(torch.tensor(x), torch.tensor(drawn))
    (
        F.mse_loss(out, torch.tensor(x)) + 0.5 * torch.sum(log_s2.exp() + m**2 - 1 - log_s2)
    ).backward()
    optimizer.step()
    state, _ = training.update_vae(training.vae_state(params, OFFICIAL), OFFICIAL, batch, key)
    moved, before = leaves(state.params), leaves(params)
    for name, p in model.named_parameters():
        keep = np.abs(p.grad.numpy()) > 1e-6
        a, b = (v - before[name] for v in (moved[name], p.detach().numpy()))
        np.testing.assert_allclose(a[keep], b[keep], atol=2e-6, err_msg=name)
        assert np.abs(b[keep]).max() > 9e-5, name


def test_drawn_parameters_have_the_spread_of_torchs_linear_layers():
    torch.manual_seed(0)
    theirs = Policy(("mean_field",))
    ours = leaves(networks.init_policy(jax.random.key(3), OFFICIAL, VIEW, FEATURES, ACTIONS))
    for name, p in theirs.named_parameters():
        assert ours[name].shape == tuple(p.shape)
        if p.numel() > 1000:
            np.testing.assert_allclose(ours[name].std(), p.detach().std(), rtol=0.05)
            np.testing.assert_allclose(np.abs(ours[name]).max(), p.detach().abs().max(), rtol=0.01)
