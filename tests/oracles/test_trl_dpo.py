"""TRL's own preference losses on random logits: value and gradient by every logit equal ours.

TRL 1.10 has no free loss functions. Its trainers' methods run on an instance that was never initialised,
with a model that returns given logits; reference log-probs, shift, masks and means are therefore TRL's.
Both compute in float64, except where TRL takes float32 itself: the alpha divergence, and ORPO's log-probs.
"""

import importlib.util
import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.dpo.registry import (
    Batch,
    SeqStats,
    Tokenwise,
    loss,
    mix,
    resolve,
    statistics,
    total,
)
from jaxrepro.methods.dpo.unpaired import density_ratio

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # the oracle's dependencies, not ours
]

B, T, V, PROMPT = 4, 8, 7, 2
IN_FLOAT32 = 1e-5  # tolerance where TRL does not compute in float64


@pytest.fixture(scope="module", autouse=True)
def double():
    """float64 on our side too."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def trl():
    """Trainer classes by name."""
    client = "trl.generation.vllm_client"
    if importlib.util.find_spec("requests") is None:  # which that module needs without declaring it
        sys.modules[client] = types.ModuleType(client)
        sys.modules[client].VLLMClient = object

    def find(module, name):
        return getattr(importlib.import_module(f"trl.{module}"), name)

    return SimpleNamespace(
        dpo=find("trainer.dpo_trainer", "DPOTrainer"),
        kto=find("trainer.kto_trainer", "KTOTrainer"),
        cpo=find("experimental.cpo.cpo_trainer", "CPOTrainer"),
        orpo=find("experimental.orpo.orpo_trainer", "ORPOTrainer"),
        bco=find("experimental.bco.bco_trainer", "BCOTrainer"),
        moments=find("experimental.bco.bco_trainer", "RunningMoments"),
        tpo=find("experimental.tpo.tpo_trainer", "TPOTrainer"),
        xpo=find("experimental.xpo.xpo_trainer", "XPOTrainer"),
        nash_md=find("experimental.nash_md.nash_md_trainer", "NashMDTrainer"),
    )


class Accelerator:
    """One process."""

    device = torch.device("cpu")
    use_distributed = False

    def gather(self, x):
        return x

    gather_for_metrics = gather


class Metrics(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


class Model(torch.nn.Module):
    """Returns the logits that belong to the ids it gets."""

    is_gradient_checkpointing = False

    def __init__(self, *pairs):
        super().__init__()
        self.pairs = pairs

    def forward(self, input_ids, **kwargs):
        return SimpleNamespace(
            logits=next(
                z for i, z in self.pairs if i.shape == input_ids.shape and (i == input_ids).all()
            )
        )


def trainer(cls, **fields):
    """An instance of `cls` that was never initialised, with these attributes in the place of its own."""
    shared = {
        "accelerator": Accelerator(), "aux_loss_enabled": False, "_total_train_tokens": 0, "is_encoder_decoder": False,
        "_metrics": {"train": Metrics(), "eval": Metrics()}, "label_smoothing": 0.0, "use_weighting": False,
        "precompute_ref_logps": False, "use_liger_kernel": False,
    }  # fmt: skip
    given = type(cls.__name__, (cls,), shared | fields)  # some are properties of the class
    return given.__new__(given)


class Problem:
    """Logits of policy and reference for rows of a prompt and a response of random length."""

    def __init__(self, rows, seed=0, scale=1.0):
        rng = np.random.default_rng(seed)
        self.logits, self.ref = (scale * rng.normal(size=(rows, T, V)) for _ in range(2))
        self.ref = self.logits + 0.5 * self.ref
        self.ids = rng.integers(0, V, (rows, T))
        self.ids[:, 0] = np.arange(rows) % V  # no two rows alike
        length = rng.integers(PROMPT + 1, T + 1, rows)
        place = np.arange(T)
        self.attention = (place < length[:, None]).astype(np.int64)
        self.mask = ((place >= PROMPT) & (place < length[:, None])).astype(np.int64)

    def torch(self, dtype=torch.float64):
        """Logits with a gradient, reference logits, and a trainer's inputs."""
        z, ref = (torch.tensor(x, dtype=dtype) for x in (self.logits, self.ref))
        ids, attention, mask = (torch.tensor(x) for x in (self.ids, self.attention, self.mask))
        inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": mask}
        return z.requires_grad_(), ref, inputs

    def tokens(self, logits, responses):
        """Our tokens (b, k, t) from logits (k b, t, v), chosen rows before rejected ones, as TRL's."""

        def one(z):
            log_p = jax.nn.log_softmax(z[:, :-1])
            lp = jnp.take_along_axis(log_p, jnp.asarray(self.ids)[:, 1:, None], -1)[..., 0]
            return lp, jax.nn.logsumexp(2 * log_p, -1)

        cut = lambda x: jnp.swapaxes(x.reshape(responses, -1, *x.shape[1:]), 0, 1)
        lp, sum_p2 = one(logits)
        mask = jnp.asarray(self.mask[:, 1:] == 1)
        return Tokenwise(cut(lp), cut(one(jnp.asarray(self.ref))[0]), cut(mask), cut(sum_p2))


def agree(ours, logits, value, grad, tolerance=1e-6):
    """`ours(logits)` has this value and gradient, relative to the largest entry."""
    got, got_grad = jax.value_and_grad(ours)(jnp.asarray(logits))
    assert got.dtype == got_grad.dtype == np.float64
    value, grad = float(value), grad.numpy()
    assert abs(float(got) - value) <= tolerance * max(1.0, abs(value))
    assert np.abs(np.asarray(got_grad) - grad).max() <= tolerance * np.abs(grad).max()
    assert np.abs(grad).max() > 0


# ---- DPOTrainer


def trl_dpo(trl, problem, dtype=torch.float64, **fields):
    z, ref, inputs = problem.torch(dtype)
    defaults = {
        "beta": 0.1, "loss_types": ["sigmoid"], "loss_weights": [1.0], "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
    }  # fmt: skip
    model = Model((inputs["input_ids"], z))
    t = trainer(
        trl.dpo,
        model=model,
        ref_model=Model((inputs["input_ids"], ref)),
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        **(defaults | fields),
    )
    value = t._compute_loss(model, dict(inputs), False)
    value.backward()
    return value, z.grad, t._metrics["train"]


def ours_of(problem, mixed, responses=2, batch=None):
    def ours(logits):
        tokens = problem.tokens(logits, responses)
        return total(mixed, [statistics(tokens, s) for s, _ in mixed], batch)[0].mean()

    return ours


SMOOTH = ("exo_pair", "robust", "aot", "aot_unpaired")
ROWS = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_dpo_trainer(trl, name, beta):
    problem = Problem(2 * B, seed=ROWS.index(name))
    e = 0.1 if name in SMOOTH else 0.0
    value, grad, _ = trl_dpo(trl, problem, loss_types=[name], beta=beta, label_smoothing=e)
    hyper = {"beta": beta} if name != "sft" else {}
    hyper |= {"label_smoothing": e} if e else {}
    agree(ours_of(problem, [(resolve(name, **hyper), 1.0)]), problem.logits, value, grad)


@pytest.mark.parametrize("names, weights", [(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]), (["ipo", "aot"], [2.0, 0.3])])  # fmt: skip
@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_sums_of_losses(trl, names, weights, ld_alpha):
    problem = Problem(2 * B, seed=1)
    fields = {"loss_types": names, "loss_weights": weights, "ld_alpha": ld_alpha}
    value, grad, _ = trl_dpo(trl, problem, **fields)
    mixed = mix(names, weights, beta=0.1, ld_alpha=ld_alpha)
    agree(ours_of(problem, mixed), problem.logits, value, grad)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm", "aot", "apo_down"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_length_desensitising(trl, name, ld_alpha):
    problem = Problem(2 * B, seed=2)
    value, grad, _ = trl_dpo(trl, problem, loss_types=[name], ld_alpha=ld_alpha)
    mixed = [(resolve(name, beta=0.1, ld_alpha=ld_alpha), 1.0)]
    agree(ours_of(problem, mixed), problem.logits, value, grad)


@pytest.mark.parametrize("name", [n for n in ROWS if n not in ("aot", "aot_unpaired", "sft", "hinge")])  # fmt: skip
def test_weighting_by_the_policy(trl, name):
    """Not sft: TRL spreads its token mean over the batch first, ours weighs each pair's own tokens.

    Not hinge: TRL 1.10 multiplies the loss in place, of which torch refuses the gradient.
    """
    problem = Problem(2 * B, seed=3)
    e = {"label_smoothing": 0.1} if name in SMOOTH else {}
    value, grad, _ = trl_dpo(trl, problem, loss_types=[name], use_weighting=True, **e)
    mixed = [(resolve(name, beta=0.1, use_weighting=True, **e), 1.0)]
    agree(ours_of(problem, mixed), problem.logits, value, grad)


DIVERGENCES = {
    "forward_kl": ("forward_kl", {}),
    "jensen_shannon": ("js_divergence", {}),
    "alpha .5": ("alpha_divergence", {"divergence_alpha": 0.5}),
    "alpha .3": ("alpha_divergence", {"divergence_alpha": 0.3}),  # TRL's coefficient is .7
    "alpha 1": ("alpha_divergence", {"divergence_alpha": 1.0}),
}


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"])  # fmt: skip
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences(trl, name, kind):
    problem = Problem(2 * B, seed=4)
    theirs, extra = DIVERGENCES[kind]
    dtype = torch.float32 if theirs == "alpha_divergence" else torch.float64
    e = {"label_smoothing": 0.1} if name in SMOOTH else {}
    value, grad, _ = trl_dpo(
        trl, problem, dtype, loss_types=[name], f_divergence_type=theirs, **e,
        f_alpha_divergence_coef=1 - extra.get("divergence_alpha", 0.5),
    )  # fmt: skip
    spec = resolve(name, beta=0.1, divergence=kind.split()[0], **extra, **e)
    tolerance = IN_FLOAT32 if dtype == torch.float32 else 1e-6
    agree(ours_of(problem, [(spec, 1.0)]), problem.logits, value, grad, tolerance)


def test_curves(trl):
    problem = Problem(2 * B, seed=5)
    _, _, theirs = trl_dpo(trl, problem, f_divergence_type="forward_kl")
    spec = resolve("sigmoid", beta=0.1, divergence="forward_kl")
    tokens = problem.tokens(jnp.asarray(problem.logits), 2)
    ours = {k: float(s / w) for k, (s, w) in loss(spec, statistics(tokens, spec))[2].items()}
    names = {"accuracy": "accuracies", "margin": "margins"}
    for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracy", "rewards/margin", "logps/chosen", "logps/rejected"):  # fmt: skip
        group, name = key.split("/")
        assert ours[key] == pytest.approx(theirs[f"{group}/{names.get(name, name)}"][0], rel=1e-6)


# ---- KTOTrainer


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", [[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0]])
@pytest.mark.parametrize("sign", [1, -1])  # of the KL's estimate: a negative one is clamped
def test_kto(trl, name, labels, sign):
    problem, other = Problem(B, seed=6), Problem(B, seed=7)
    other.ids[:, 0] = (other.ids[:, 0] + 3) % V
    estimate = statistics(other.tokens(jnp.asarray(other.logits), 1), resolve("kto")).a.mean()
    if float(estimate) * sign < 0:
        other.logits, other.ref = other.ref, other.logits
    (z, ref, inputs), (z_kl, ref_kl, kl) = problem.torch(), other.torch()
    ids = inputs["input_ids"], kl["input_ids"]
    model = Model((ids[0], z), (ids[1], z_kl))
    t = trainer(
        trl.kto, model=model, ref_model=Model((ids[0], ref), (ids[1], ref_kl)), beta=0.5, loss_type=name,
        calculate_KL=name == "kto", desirable_weight=1.2, undesirable_weight=0.7,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    value = t._compute_loss(
        model,
        inputs | {f"KL_{k}": v for k, v in kl.items()} | {"label": torch.tensor(labels)},
        False,
    )
    value.backward()
    tokens = other.tokens(jnp.asarray(other.logits), 1)
    shifted = statistics(tokens, resolve("kto"))
    batch = Batch(labels=jnp.array(labels) == 1, kl_p=shifted.p[:, 0], kl_q=shifted.q[:, 0])
    mixed = [(resolve(name, beta=0.5, lambda_d=1.2, lambda_u=0.7), 1.0)]
    agree(ours_of(problem, mixed, 1, batch), problem.logits, value.detach(), z.grad)


# ---- CPOTrainer, ORPOTrainer: labels hold the response, -100 elsewhere


def halves(problem, dtype=torch.float64):
    """Inputs of the two trainers, whose rows they concatenate themselves."""
    z, _, inputs = problem.torch(dtype)
    labels = torch.where(inputs["completion_mask"] == 1, inputs["input_ids"], -100)
    out = {}
    for name, rows in (("chosen", slice(0, B)), ("rejected", slice(B, None))):
        out[f"{name}_input_ids"] = inputs["input_ids"][rows]
        out[f"{name}_attention_mask"] = inputs["attention_mask"][rows]
        out[f"{name}_labels"] = labels[rows]

    class Concatenated(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            assert (input_ids == inputs["input_ids"]).all()
            return SimpleNamespace(logits=z)

    return z, Concatenated(), out


CPO = {  # our loss; TRL's settings
    "cpo": (("cpo", {"beta": 0.3, "alpha": 0.7}), {"beta": 0.3, "cpo_alpha": 0.7, "loss_type": "sigmoid"}),
    "cpo smoothed": (
        ("cpo", {"beta": 0.3, "alpha": 0.0, "label_smoothing": 0.2}),
        {"beta": 0.3, "cpo_alpha": 0.0, "loss_type": "sigmoid", "label_smoothing": 0.2},
    ),
    "cpo hinge": (("cpo", {"beta": 0.3, "link": "hinge"}), {"beta": 0.3, "loss_type": "hinge"}),
    "cpo ipo": (("cpo", {"beta": 0.3, "link": "ipo"}), {"beta": 0.3, "loss_type": "ipo"}),
    "simpo": (
        ("simpo", {"beta": 2.0, "gamma": 0.5}),
        {"beta": 2.0, "simpo_gamma": 0.5, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
    "cpo-simpo": (
        ("simpo", {"beta": 2.0, "gamma": 0.5, "nll_weight": 0.3, "label_smoothing": 0.1}),
        {"beta": 2.0, "simpo_gamma": 0.5, "loss_type": "simpo", "cpo_alpha": 0.3, "label_smoothing": 0.1},
    ),
    "alphapo": (
        ("alphapo", {"beta": 2.5, "gamma": 0.1, "alpha": 0.25}),
        {"beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
    "alphapo, negative": (
        ("alphapo", {"beta": 2.5, "gamma": 0.1, "alpha": -0.5}),
        {"beta": 2.5, "simpo_gamma": 0.1, "alpha": -0.5, "loss_type": "simpo", "cpo_alpha": 0.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CPO)
def test_cpo_trainer(trl, case):
    (name, hyper), fields = CPO[case]
    problem = Problem(2 * B, seed=8)
    z, model, batch = halves(problem)
    defaults = {"alpha": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "pad_token_id": 0}
    value, _ = trainer(trl.cpo, **(defaults | fields)).get_batch_loss_metrics(model, batch)
    value.backward()
    agree(ours_of(problem, [(resolve(name, **hyper), 1.0)]), problem.logits, value.detach(), z.grad)


def test_orpo_trainer(trl):
    problem = Problem(2 * B, seed=9)
    z, model, batch = halves(problem)
    value, _ = trainer(trl.orpo, beta=0.2, padding_value=0).get_batch_loss_metrics(model, batch)
    value.backward()
    spec = resolve("orpo", lam=0.2, prompt_nll=True)

    def ours(logits):
        tokens = problem.tokens(logits, 2)
        prompt = jnp.asarray((problem.attention - problem.mask)[:B, 1:])
        extra = Batch(
            prompt_p=(tokens.lp[:, 0] * prompt).sum(-1), prompt_n=prompt.sum(-1).astype(float)
        )
        return loss(spec, statistics(tokens, spec), extra)[0].mean()

    agree(ours, problem.logits, value.detach(), z.grad, IN_FLOAT32)


# ---- TPOTrainer, BCOTrainer


@pytest.mark.parametrize("name", ["tpo", "tpo_l"])
def test_tpo_trainer(trl, name):
    problem = Problem(3 * B, seed=10)
    problem.ids[:, 0] = np.arange(3 * B) % V
    z, _, inputs = problem.torch()
    model = Model((inputs["input_ids"], z))
    theirs = {"tpo": "sigmoid", "tpo_l": "tpo-l"}[name]
    t = trainer(trl.tpo, model=model, beta=0.3, tpo_alpha=0.6, tpo_l_gamma=0.5, loss_type=theirs)
    value = t._compute_loss(model, dict(inputs), False)
    value.backward()
    hyper = {"beta": 0.3, "alpha": 0.6}

    def ours(logits):
        tokens = problem.tokens(logits, 3)  # chosen, rejected, gold
        ordered = Tokenwise(*(x if x is None else x[:, jnp.array([2, 0, 1])] for x in tokens))
        spec = resolve(name, **hyper)
        return loss(spec, statistics(ordered, spec))[0].mean()

    agree(ours, problem.logits, value.detach(), z.grad)


@pytest.mark.parametrize("matched", [False, True])
def test_bco_trainer_over_three_batches(trl, matched):
    accelerator = Accelerator()
    t = trainer(
        trl.bco, beta=0.3, running=trl.moments(accelerator), accelerator=accelerator,
        embedding_func=len if matched else None, embedding_tokenizer=len if matched else None,
        args=SimpleNamespace(min_density_ratio=0.5, max_density_ratio=10.0), _get_chosen_prob=lambda self, x: x,
    )  # fmt: skip
    rng, state, spec = np.random.default_rng(11), None, resolve("bco", beta=0.3)
    labels = jnp.arange(6) < 3
    for _ in range(3):
        p, q = (-rng.uniform(1, 20, 6) for _ in range(2))
        desirable = torch.tensor(rng.uniform(0.05, 0.95, 3))
        policy = torch.tensor(p, requires_grad=True)
        losses, *_, delta = t.bco_loss(
            policy[:3], policy[3:], torch.tensor(q[:3]), torch.tensor(q[3:]), None, desirable
        )
        losses.nanmean().backward()
        rho = density_ratio(jnp.asarray(np.r_[np.full(3, 0.5), desirable.numpy()]))
        batch = Batch(labels=labels, prompt_weight=rho if matched else None)

        def ours(p, q=q, batch=batch, state=state):
            seq = SeqStats(p[:, None], jnp.asarray(q)[:, None], jnp.ones((6, 1)))
            per_item, after, _ = loss(spec, seq, batch, state)
            return per_item.mean(), after

        state = ours(jnp.asarray(p))[1]
        agree(lambda p, f=ours: f(p)[0], p, losses.nanmean().detach(), policy.grad)
        assert float(state.mean) == pytest.approx(float(delta), rel=1e-6)


# ---- XPOTrainer, NashMDTrainer: their loss methods take log-probs of tokens


@pytest.mark.parametrize("link", ["logistic", "ipo"])
def test_xpo_trainer(trl, link):
    rng = np.random.default_rng(12)
    own, theirs, ref_of_theirs, ref_of_own = (-rng.uniform(0.1, 2, (B, T)) for _ in range(4))
    first = np.array([True, False, True, False])  # the policy's own sample was chosen
    args = SimpleNamespace(loss_type={"logistic": "sigmoid"}.get(link, link))
    t = trainer(trl.xpo, alpha=0.3, beta=0.1, args=args)
    x = [torch.tensor(v, requires_grad=True) for v in (own, theirs)]
    fixed = [torch.tensor(v) for v in (ref_of_theirs, ref_of_own)]
    value, *_ = t._compute_losses(*x, *fixed, torch.tensor(first))
    value.backward()
    spec = resolve("xpo", beta=0.1, alpha=0.3, link=link)
    order = lambda a, b: jnp.where(first[:, None], jnp.stack([a, b], 1), jnp.stack([b, a], 1))
    q = order(*(jnp.asarray(v.sum(1)) for v in (ref_of_own, ref_of_theirs)))

    def ours(lp):
        seq = SeqStats(order(lp[0].sum(1), lp[1].sum(1)), q, jnp.full((B, 2), float(T)))
        return loss(spec, seq, Batch(explore=jnp.where(first, 1, 0)))[0].mean()

    agree(ours, np.stack([own, theirs]), value.detach(), torch.stack([x[0].grad, x[1].grad]))


def test_nash_md_trainer(trl):
    rng = np.random.default_rng(13)
    lp, ref = (-rng.uniform(0.1, 2, (B, T)) for _ in range(2))
    probability = rng.uniform(size=B)
    t = trainer(trl.nash_md, beta=0.2)
    x = torch.tensor(lp, requires_grad=True)
    value, *_ = t._compute_losses(x, torch.tensor(ref), torch.tensor(probability))
    value.backward()
    spec = resolve("nash_md", beta=0.2)
    whole = jnp.ones((B, 1, T), bool)
    batch = Batch(scores=jnp.asarray(probability)[:, None])

    def ours(lp):
        tokens = Tokenwise(lp[:, None], jnp.asarray(ref)[:, None], whole)
        return loss(spec, statistics(tokens, spec), batch)[0].mean()

    agree(ours, lp, value.detach(), x.grad)
