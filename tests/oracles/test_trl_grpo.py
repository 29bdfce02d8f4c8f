"""TRL's own GRPO code (loss and advantages), called on random tensors, and math-verify beside our rules."""

import importlib.util
import re
import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrepro.methods.stepgrpo.objective import loss
from jaxrepro.rewards import maths
from jaxrepro.rl import masks
from jaxrepro.rl.advantages import group_advantage

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # the oracle's dependencies, not ours
]

B, N, T = 3, 4, 7


@pytest.fixture(scope="module")
def trainer_class():
    pytest.importorskip("trl")
    client = "trl.generation.vllm_client"
    if importlib.util.find_spec("requests") is None:  # which that module needs without declaring it
        sys.modules[client] = types.ModuleType(client)
        sys.modules[client].VLLMClient = object
    from trl import GRPOTrainer

    return GRPOTrainer


class Accelerator:
    """One process."""

    num_processes = 1
    is_main_process = True
    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction="sum"):
        return x


class Metrics(dict):
    def __missing__(self, key):
        self[key] = []
        return self[key]


def trl_loss(cls, lp, ref, old, adv, mask, ratio, **settings):
    """Value and gradient of GRPOTrainer._compute_loss, its model replaced by given log-probs."""
    lp = torch.tensor(np.asarray(lp), dtype=torch.float64).reshape(-1, T).requires_grad_()
    rows = {
        k: torch.tensor(np.asarray(v), dtype=torch.float64).reshape(-1, T)
        for k, v in (("ref", ref), ("old", old), ("ratio", ratio))
    }
    mask = torch.tensor(np.asarray(mask)).reshape(-1, T).long()
    t = cls.__new__(cls)
    defaults = {
        "beta": 0.0, "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2,
        "epsilon_high": 0.2, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "aux_loss_enabled": False, "use_vllm": False, "vllm_importance_sampling_correction": False,
        "max_completion_length": T, "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False, "model": SimpleNamespace(training=True), "accelerator": Accelerator(),
        "_metrics": {"train": Metrics(), "eval": Metrics()},
    }  # fmt: skip
    delta = settings.pop("delta", None)
    for k, v in (defaults | settings).items():
        object.__setattr__(t, k, v)
    args = SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1)
    object.__setattr__(t, "args", args)
    t._get_per_token_logps_and_entropies = lambda *a, **k: (lp, torch.zeros_like(lp), None)
    ids = torch.zeros_like(mask)
    value = t._compute_loss(
        None,
        {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
            "completion_mask": mask, "ref_per_token_logps": rows["ref"], "old_per_token_logps": rows["old"],
            "advantages": torch.tensor(np.asarray(adv), dtype=torch.float64).reshape(-1),
            "num_items_in_batch": mask.sum(), "importance_sampling_ratio": rows["ratio"],
        },
    )  # fmt: skip
    value.backward()
    return value.item(), lp.grad.reshape(B, N, T).numpy()


CASES = {  # our arguments; TRL's settings
    "grpo": ({"beta": 0.04}, {"beta": 0.04}),
    "grpo without kl": ({"beta": 0.0}, {}),
    "grpo clipped": ({"beta": 0.04, "clip": (0.2, 0.2)}, {"beta": 0.04}),
    "bnpo": ({"beta": 0.04, "mode": "bnpo"}, {"beta": 0.04, "loss_type": "bnpo"}),
    "dapo": ({"beta": 0.0, "mode": "dapo", "clip": (0.2, 0.28)}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({"beta": 0.04, "mode": "dr_grpo", "max_length": T, "clip": (0.2, 0.2)}, {"beta": 0.04, "loss_type": "dr_grpo"}),
    "gspo": (
        {"beta": 0.04, "level": "sequence", "clip": (0.03, 0.04)},
        {"beta": 0.04, "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    ),
    "two-sided": ({"beta": 0.0, "clip": (0.2, 0.2), "delta": 1.5}, {"delta": 1.5}),
    "sampler correction": (
        {"beta": 0.04, "clip": (0.2, 0.2), "sampler_cap": 1.3},
        {"beta": 0.04, "use_vllm": True, "vllm_importance_sampling_correction": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_equal_trl(trainer_class, name, seed):
    ours, theirs = CASES[name]
    k = jax.random.split(jax.random.key(seed), 6)
    lp, ref, old, sampler = (
        -jax.random.uniform(k[i], (B, N, T), minval=0.1, maxval=1.5) for i in range(4)
    )
    if "clip" not in ours:
        old = lp  # StepGRPO has no old policy; TRL always clips
    adv = group_advantage(jax.random.uniform(k[4], (B, N))).value
    mask = masks.from_length(jax.random.randint(k[5], (B, N), 1, T + 1), T)
    extra = {"lp_sampler": sampler} if "sampler_cap" in ours else {}

    def mean(lp):
        total, weight, _ = loss(lp, ref, adv, mask, old_lp=old, **ours, **extra)
        return total / weight

    ratio = jnp.minimum(jnp.exp(lp - sampler), ours.get("sampler_cap", 1.0))
    want, want_grad = trl_loss(trainer_class, lp, ref, old, adv, mask, ratio, **theirs)
    got, got_grad = jax.value_and_grad(mean)(lp)
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(got_grad, want_grad, atol=1e-6)


# ---- advantages: TRL computes them inside a long method, so its own lines are cut out and run


def trl_advantages(cls, rewards, aggregation, scale):
    import inspect
    import textwrap

    from trl.trainer import grpo_trainer

    source = inspect.getsource(cls._generate_and_score_completions)
    start = source.index("        unscorable_mask = ")
    end = source.index("torch.nan_to_num(advantages, nan=0.0)", start)
    lines = textwrap.dedent(source[start : source.index("\n", end)])
    assert re.search(r"^advantages = ", lines, re.MULTILINE)
    parts = rewards.shape[-1]
    scope = {
        **vars(grpo_trainer),
        "self": SimpleNamespace(
            multi_objective_aggregation=aggregation,
            scale_rewards=scale,
            reward_weights=torch.tensor([1.0, 0.5][:parts], dtype=torch.float64),
            reward_funcs=[None] * parts,
        ),
        "rewards_per_func": torch.tensor(rewards.reshape(-1, parts)),
        "num_generations": rewards.shape[1],
        "device": "cpu",
    }
    exec(lines, scope)
    return scope["advantages"].reshape(rewards.shape[:2]).numpy()


@pytest.mark.parametrize(
    "mode, aggregation, scale",
    [
        ("grpo", "sum_then_normalize", "group"),
        ("dr_grpo", "sum_then_normalize", "none"),
        ("batch_std", "sum_then_normalize", "batch"),
        ("gdpo", "normalize_then_sum", "group"),
    ],
)
@pytest.mark.parametrize("holes", [False, True])
def test_advantages_equal_trl(trainer_class, mode, aggregation, scale, holes):
    r = np.asarray(jax.random.uniform(jax.random.key(0), (5, 4, 2)), np.float64)
    if holes:
        r[0, 1] = r[2, 0] = r[2, 3] = np.nan
    want = trl_advantages(trainer_class, r, aggregation, scale)
    got = group_advantage(jnp.asarray(r, jnp.float32), mode=mode, weights=(1.0, 0.5)).value
    np.testing.assert_allclose(got, want, atol=1e-4)


# ---- math-verify


@pytest.fixture(scope="module")
def math_verify():
    return pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    "answer, gold, want",
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("1,234", "1234", True),
        ("50%", "0.5", True),
        ("(1,2)", "(1, 2)", True),
        ("(2,1)", "(1,2)", False),
        ("6", "5", False),
        ("x+2", "x+1", False),
        (r"\sqrt{2}", "1.5", False),
    ],
)
def test_rules_agree_with_math_verify(math_verify, answer, gold, want):
    assert maths.equal(answer, gold) is want
    assert maths.math_verify(f"${gold}$", f"${answer}$") is want
    assert maths.correct(answer, gold, checker="math_verify") is want


def test_official_checker_credits_a_number_of_the_last_step(math_verify):
    from jaxrepro.methods.stepgrpo import rewards

    text = "### Step 1:\nso it is 12\n\n### The final answer is:\nunknown"
    assert rewards.accuracy("12", text, checker="official") == 1  # the defect, kept in code_*
    assert rewards.accuracy("12", text) == 0
