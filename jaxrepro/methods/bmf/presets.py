"""Presets of BMF, arXiv:2505.06706: what the official code does, and the repaired method. Imports nothing.

official  what the official code does, defects included
fixed     the method as its framework figure shows it; the default

A row of DEPARTURES says why the two differ in a field. Fields that are not listed are the same in both.
"""

OFFICIAL = {
    "mf_form": "mixed",
    "inter": "cosine",
    "cluster_on": "sample",
    "vae_target": "state",
    "vae_reduction": "official",
    "shared_vae": False,
    "bootstrap": "official",
    "nan_probabilities": "zero",
}

FIXED = {
    "mf_form": "bilevel",
    "inter": "attention",
    "cluster_on": "mean",
    "vae_target": "state_action_value",
    "vae_reduction": "fixed",
    "shared_vae": True,
    "bootstrap": "fixed",
    "nan_probabilities": "keep",
}

PRESETS = {"official": OFFICIAL, "fixed": FIXED}

DEPARTURES = {
    "mf_form": "the figure shows two vectors, of the own group and of the groups together; the code has one",
    "inter": "cosine over its row sum is signed and unbounded; the figure shows an attention head",
    "cluster_on": "the code clusters one noisy sample of the posterior, not its mean",
    "vae_target": "the figure encodes state and action and predicts the next value; the code sees states alone",
    "vae_reduction": "the code adds the KL over the batch and averages the error: the posterior collapses",
    "shared_vae": "the code trains the VAE of one team and leaves the other's as it was drawn",
    "bootstrap": "the code bootstraps with the last observation that an agent saw, even where it died",
    "nan_probabilities": "the code turns NaN probabilities into 0, which hides that training has failed",
}
