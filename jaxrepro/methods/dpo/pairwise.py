"""Losses of one pair against a reference: the likelihood-ratio family.

Everywhere a = log pi(y|x) - log ref(y|x), D = a_w - a_l, S(z) = -log sigmoid(z); s is a, or the score of
an f-divergence, and delta = s_w - s_l (`divergences.score`). A docstring is the loss of a pair.
"""

import jax
import jax.numpy as jnp

from jaxrepro.methods.dpo import links
from jaxrepro.methods.dpo.divergences import chi_squared
from jaxrepro.methods.dpo.links import exp, logistic
from jaxrepro.methods.dpo.spec import variant

sigma = jax.nn.sigmoid

# ---- rows of TRL's DPOTrainer


@variant("2305.18290", "TRL", divergence=True)
def sigmoid(s, batch, *, beta=0.1):
    """DPO: S(beta delta)."""
    return logistic(beta * s.delta)


@variant(
    "2305.10425", "TRL", divergence=True, notes=("RSO (2309.06657) calls it hinge-norm, gamma .05",)
)
def hinge(s, batch, *, beta=0.1):
    """SLiC's link on log-ratios: max(0, 1 - beta delta)."""
    return links.hinge(beta * s.delta)


@variant(
    "2310.12036",
    "TRL",
    divergence=True,
    notes=(
        "per-token means, as TRL, HALOs and LLaMA-Factory; the paper's formula shows sums: ipo_sum",
        "beta is the paper's tau; its scale differs from ipo_sum's by about the length",
    ),
)
def ipo(s, batch, *, beta=0.1):
    """(s_w/n_w - s_l/n_l - 1/(2 beta))^2."""
    s_bar = s.s / s.length
    return (s_bar[:, 0] - s_bar[:, 1] - 1 / (2 * beta)) ** 2


@variant("2310.12036", "official")
def ipo_sum(s, batch, *, beta=0.1):
    """(D - 1/(2 beta))^2."""
    return (s.d - 1 / (2 * beta)) ** 2


@variant(
    "2402.00856",
    "TRL",
    divergence=True,
    choices={"targets": ("smoothed", "official")},
    notes=(
        "the official code's log-targets are (0, -10) instead of (log(1-eps), log eps): targets",
    ),
)
def exo_pair(s, batch, *, beta=0.1, label_smoothing=1e-3, targets="smoothed"):
    """EXO eq. 16: KL((q, 1-q) || (1-eps, eps)), q = sigmoid(beta delta); or log-targets (0, -10), "official"."""
    z = beta * s.delta
    eps = jnp.asarray(label_smoothing, z.dtype)
    log_w, log_l = (0.0, -10.0) if targets == "official" else (jnp.log1p(-eps), jnp.log(eps))
    return sigma(z) * (-logistic(z) - log_w) + sigma(-z) * (-logistic(-z) - log_l)


@variant("2402.05369", "TRL")
def nca_pair(s, batch, *, beta=0.01):
    """NCA for two: S(beta a_w) + S(-beta a_w)/2 + S(-beta a_l)/2."""
    w, l = beta * s.a_w, beta * s.a_l
    return logistic(w) + 0.5 * logistic(-w) + 0.5 * logistic(-l)


@variant(
    "2403.00409",
    "TRL",
    divergence=True,
    notes=("TRL only warns where label_smoothing is not in [0, .5)",),
)
def robust(s, batch, *, beta=0.1, label_smoothing=0.1):
    """rDPO: ((1-e) S(z) - e S(-z))/(1-2e), z = beta delta: unbiased for labels flipped at rate e."""
    z, e = beta * s.delta, label_smoothing
    return ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)


@variant(
    "2305.18290",
    "official",
    notes=("conservative DPO, a note by E. Mitchell in DPO's repository; HALOs takes e = .2",),
)
def cdpo(s, batch, *, beta=0.1, label_smoothing=0.1):
    """(1-e) S(beta D) + e S(-beta D)."""
    return logistic(beta * s.d, label_smoothing)


@variant(
    "2404.04656",
    "TRL",
    notes=("no running shift, as in TRL; SamPO and LLaMA-Factory subtract a running mean",),
)
def bco_pair(s, batch, *, beta=0.01):
    """S(beta a_w) + S(-beta a_l)."""
    return logistic(beta * s.a_w) + logistic(-beta * s.a_l)


@variant(
    "2405.00675",
    "TRL",
    notes=(
        "the official code has a factor 1/2 and soft probabilities: sppo_soft",
        "the official recipe says beta .01, its launch script .001; .001 is right",
    ),
)
def sppo_hard(s, batch, *, beta=0.001):
    """(a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2."""
    return (s.a_w - 0.5 / beta) ** 2 + (s.a_l + 0.5 / beta) ** 2


@variant("2408.06266", "TRL")
def apo_zero(s, batch, *, beta=0.1):
    """APO eq. 7: 1 - sigmoid(beta a_w) + sigmoid(beta a_l)."""
    return sigma(-beta * s.a_w) + sigma(beta * s.a_l)


@variant("2408.06266", "TRL")
def apo_down(s, batch, *, beta=0.1):
    """APO eq. 8: sigmoid(beta a_w) + 1 - sigmoid(beta D)."""
    return sigma(beta * s.a_w) + sigma(-beta * s.d)


@variant(
    "2406.08414",
    "TRL",
    divergence=True,
    notes=("at policy = reference and its tau of .05 descent lowers the margin: slope +.78 in z",),
)
def discopop(s, batch, *, beta=0.05, tau=0.05):
    """S(z)(1-m) + e^-z m, m = sigmoid(z/tau), z = beta delta."""
    z = beta * s.delta
    m = sigma(z / tau)
    return logistic(z) * (1 - m) + exp(-z) * m


@variant("2411.15124", "TRL", divergence=True, notes=("Tulu 3's length-normalised DPO",))
def sigmoid_norm(s, batch, *, beta=0.1):
    """S(beta (s_w/n_w - s_l/n_l))."""
    s_bar = s.s / s.length
    return logistic(beta * (s_bar[:, 0] - s_bar[:, 1]))


@variant("2309.16240", "TRL", divergence=True)
def fdpo(s, batch, *, beta=0.1, divergence="jensen_shannon"):
    """f-DPO: `sigmoid` with a divergence other than reverse KL."""
    return logistic(beta * s.delta)


# ---- where the log-ratio is bent, weighted or shifted


@variant(
    "2407.13399", "inferred", notes=("the clip is meant against overfitting, not for numbers",)
)
def chipo(s, batch, *, beta=0.1, r_max=1.0):
    """chiPO: S(clip(beta (phi_w - phi_l), +-2 r_max)), phi = e^a + a."""
    phi = chi_squared(s.a)
    return logistic(jnp.clip(beta * (phi[:, 0] - phi[:, 1]), -2 * r_max, 2 * r_max))


@variant(
    "2403.19159",
    "public",
    notes=(
        "sign + from the derivation (SamPO's code); alpha-DPO's repository has minus",
        "alpha stands inside S, not multiplied by beta",
    ),
)
def rdpo_len(s, batch, *, beta=0.1, alpha=0.01):
    """R-DPO: S(beta D + alpha (n_w - n_l)): a longer chosen response is pushed less."""
    return logistic(beta * s.d + alpha * (s.n[:, 0] - s.n[:, 1]))


@variant("2402.13228", "public", notes=("the penalty stands inside beta",))
def dpop(s, batch, *, beta=0.1, lam=50.0):
    """DPO-Positive (Smaug): S(beta (D - lam max(0, -a_w)))."""
    return logistic(beta * (s.d - lam * jax.nn.relu(-s.a_w)))


@variant(
    "2502.07599", "official", notes=("with final, f runs linearly from f to final over training",)
)
def dpo_shift(s, batch, *, beta=0.1, f=0.95, final=None):
    """S(beta (a_w - f a_l)). `final` also needs `Batch.progress`."""
    if final is not None:
        f = f + (final - f) * batch.progress
    return logistic(beta * (s.a_w - f * s.a_l))


@variant("2406.07327", "inferred", notes=("no default in the source; beta_l below beta_w is ours",))
def flex(s, batch, *, beta_w=0.1, beta_l=0.05):
    """Flex-DPO (3D-properties): S(beta_w a_w - beta_l a_l)."""
    return logistic(beta_w * s.a_w - beta_l * s.a_l)


@variant(
    "2412.14516",
    "official",
    notes=(
        "no beta inside S; the official code's weight is .5, the paper's 1 (unverified)",
        "beta .002 sets targets of +-250: clip gradients",
    ),
)
def cal_dpo(s, batch, *, beta=0.002, weight=0.5):
    """S(D) + c [(a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2]."""
    target = 1 / (2 * beta)
    return logistic(s.d) + weight * ((s.a_w - target) ** 2 + (s.a_l + target) ** 2)


@variant("2402.05749", "inferred", choices={"link": tuple(links.LINKS)})
def gpo(s, batch, *, beta=0.1, link="truncated_square"):
    """GPO: f(beta D) for a link f."""
    return links.link(link, beta * s.d)


@variant("2501.06645", "inferred")
def focalpo(s, batch, *, beta=0.1, gamma=0.05):
    """sigmoid(beta D)^gamma S(beta D): pairs that are ranked wrongly count less."""
    return links.focal(beta * s.d, gamma)


# ---- procedures whose loss is another one, under its paper's name and defaults


@variant(
    "2409.06411",
    "TRL",
    notes=("policy and reference, as TRL; LLaMA-Factory weights only the policy",),
)
def ld_dpo(s, batch, *, beta=0.1, ld_alpha=0.5):
    """LD-DPO: `sigmoid`; tokens beyond the shorter response count alpha."""
    return logistic(beta * s.d)


@variant(
    "2406.11827",
    "TRL",
    notes=("the official code clamps the product of weights at 1: clamp_weight",),
)
def wpo(s, batch, *, beta=0.1, use_weighting=True):
    """WPO: `sigmoid`, each pair weighted by how likely the policy is to write it."""
    return logistic(beta * s.d)


@variant(
    "2406.18629", "official", schema="step", notes=("beta .4 for the 72B model; no end of turn",)
)
def step_dpo(s, batch, *, beta=0.05):
    """Step-DPO: `sigmoid` on one next step after a correct prefix."""
    return logistic(beta * s.d)
