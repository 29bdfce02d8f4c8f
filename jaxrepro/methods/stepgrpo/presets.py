"""Behaviour presets of StepGRPO: where paper (arXiv:2503.12937) and official code differ. Imports nothing.

paper    what the paper says, with the defects of the code repaired
code_2b  what the official 2B script does (vLLM sampling)
code_7b  what the official 7B script does (Hugging Face `generate`: temperature hard-coded, top_k 50)

gate              "answered": a completion without an answer gets no alpha k;  "always": it does
background_first  validity also wants description and rationale before the first step
nonempty_answer   validity also wants text after every answer header
matcher           "substring" | "token_boundary" | "auto" (token boundary for keys that are pure numbers)
checker           "rules": rewards/maths.py on the answer field;  "math_verify": the same field through that
                  package, gold first;  "official": whole completion, arguments reversed, then exact equality
loss_temperature  "match": log-probs of the loss at the sampling temperature;  "1.0": always at 1
temperature, top_k  None: the config's value; a number: the script ignores the config

Not reproduced in any preset, because they only destroy information: cutting multimodal prompts to 512
tokens, one limit for prompt and completion together, and reward arguments repeated M times.
"""

PRESETS = {
    "paper": {
        "gate": "answered",
        "background_first": True,
        "nonempty_answer": True,
        "matcher": "auto",
        "checker": "rules",
        "loss_temperature": "match",
        "temperature": None,
        "top_k": None,
    },
    "code_2b": {
        "gate": "always",
        "background_first": False,
        "nonempty_answer": False,
        "matcher": "substring",
        "checker": "official",
        "loss_temperature": "1.0",
        "temperature": None,
        "top_k": None,
    },
    "code_7b": {
        "gate": "always",
        "background_first": False,
        "nonempty_answer": False,
        "matcher": "substring",
        "checker": "official",
        "loss_temperature": "1.0",
        "temperature": 1.0,
        "top_k": 50,
    },
}

# Which reward parts an arm adds up (rewards.py, `components`); every arm but "sft" is RL from one warm-up.
ARMS = ("stepgrpo", "outcome", "outcome_format", "no_steprar", "no_steprvr")
