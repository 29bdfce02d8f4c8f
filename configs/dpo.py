"""Direct preference optimisation and its variants (survey arXiv:2503.11701): 89 losses, one config.

  python -m jaxrepro.launch --config=configs/dpo.py                     tiny: 2 CPU cores, 2 minutes
  python -m jaxrepro.launch --config=configs/dpo.py --config.loss.name=simpo --config.loss.gamma=0.5
  python -m jaxrepro.launch --config=configs/dpo.py --config.loss.name=sigmoid+sft --config.loss.shares=1,0.005
  python -m jaxrepro.launch --config=configs/dpo.py --config.online.kind=online_dpo
  python -m jaxrepro.launch --config=configs/dpo.py:smollm2             a real model on 2 CPU cores

`tiny` learns letters from scratch: 16 tokens with a known reward, a reference by supervised fine-tuning, and
preferences by Bradley-Terry (data.annotator: others). `smollm2` draws its own answers to grade-school problems and
prefers right ones. data.path takes pairs of your own: a JSONL file, a folder or a hub name; `loss.name` any key of
`jaxrepro.methods.dpo.registry`, or several joined by "+"; its hyper-parameters are config.loss.*, None = the default
of the loss.
"""

from ml_collections import ConfigDict, config_dict

from jaxrepro.methods.dpo.hyper import HYPERPARAMETERS

SIZES = {
    "tiny": {"needs": "2 CPU cores, 2 GB", "minutes": "2"},
    "smollm2": {"needs": "2 CPU cores, 8 GB, network once", "minutes": "60 (unmeasured)"},
    "gpu": {"needs": "one 80 GB GPU, network once", "minutes": "10-30 (unmeasured)"},
    "paper_mistral_base": {"needs": "8 x 80 GB GPU, UltraFeedback", "minutes": "(unmeasured)"},
    "paper_mistral_instruct": {"needs": "8 x 80 GB GPU, UltraFeedback", "minutes": "(unmeasured)"},
    "paper_llama3_base": {"needs": "8 x 80 GB GPU, UltraFeedback", "minutes": "(unmeasured)"},
    "paper_llama3_instruct": {"needs": "8 x 80 GB GPU, UltraFeedback", "minutes": "(unmeasured)"},
}
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # of its template
# The four settings of the SimPO study (arXiv:2405.14734): model, data, tokens, SimPO (beta, gamma / beta, lr), DPO lr
PAPER = {
    "mistral_base": ("alignment-handbook/zephyr-7b-sft-full", "HuggingFaceH4/ultrafeedback_binarized",
                     1024, (2.0, 0.8, 3e-7), 5e-7, "mistral_7b"),
    "mistral_instruct": ("mistralai/Mistral-7B-Instruct-v0.2", "princeton-nlp/mistral-instruct-ultrafeedback",
                         2048, (2.5, 0.1, 5e-7), 5e-7, "mistral_7b"),
    "llama3_base": ("princeton-nlp/Llama-3-Base-8B-SFT", "HuggingFaceH4/ultrafeedback_binarized",
                    2048, (2.0, 0.5, 6e-7), 5e-7, "llama3_8b"),
    "llama3_instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback",
                        2048, (2.5, 0.55, 1e-6), 7e-7, "llama3_8b"),
}  # fmt: skip


def get_config(size: str = "tiny") -> ConfigDict:
    """The configuration of one size."""
    config = ConfigDict()
    config.method = "dpo"
    config.seed = 0
    config.steps = 300
    config.mesh = (1, 1, 1, 1)  # data, fsdp, sequence, tensor
    config.init_from = config_dict.placeholder(str)  # a workdir: start from its last parameters

    config.model = model = ConfigDict()
    model.path = config_dict.placeholder(str)  # folder, .gguf file, hub name, or smollm2
    model.shape = "letters"  # for --dry_run; letters is also what is trained where there is no path
    model.dtype = "float32"
    model.remat = "none"
    config.lora = ConfigDict(dict(rank=0, alpha=16.0, targets="layers/.*", init="kaiming"))

    config.data = data = ConfigDict()
    data.path = config_dict.placeholder(str)  # JSONL file, folder, or hub name; else the generator
    data.subset = config_dict.placeholder(str)  # of a hub name
    data.schema = config_dict.placeholder(str)  # of the records; None: what the loss reads
    data.generator = "letters"  # letters (pairs); chains, gsm_symbolic (questions, for online.kind)
    data.annotator = "bradley_terry"  # of the letters: bradley_terry, best, length, edit
    data.flips = 0.0  # share of labels of the letters that are turned round
    data.bias = 0.5  # of the annotator "length": nats a letter
    data.n = 4000  # pairs or questions that a generator draws
    data.max_tokens = 48  # of a row; what is longer is cut at its end
    data.max_completion = 12  # tokens of a drawn response, its end included
    data.responses = 0  # of a ranking
    data.system = ""  # "" = no system turn
    data.template = True  # False: prompts are plain text

    paper = size.startswith("paper_") and size in SIZES
    config.study = size.removeprefix("paper_") if paper else ""  # whose settings `resolve` fills in
    config.loss = ConfigDict(dict(name="simpo" if paper else "sigmoid", shares=()))
    for name, kind in HYPERPARAMETERS.items():
        config.loss[name] = config_dict.placeholder(kind)

    # auto: cached for data that exists, adapter with LoRA, live or synced for drawn pairs, none where it may
    config.reference = ConfigDict(dict(kind="auto", every=512, alpha=0.6))
    config.judge = "jaxrepro.methods.dpo.world:judge"  # module:function; scores samples

    config.online = ConfigDict(
        dict(
            kind="",  # online_dpo, iterative, spin, sppo, xpo, selm, nash_md; "": data exists
            every=1,  # steps of a round
            samples=2,
            temperature=0.9,
            tries=4,  # prompts asked for each pair at most
            missing_end=0.0,  # taken off the score of a response without an end
            scale=1.0,  # of scores, before P(win) = sigmoid of their difference
            mixture=0.5,  # share of the reference in Nash-MD's mixture
            slots=64,  # responses that are drawn at a time
        )
    )
    optimiser = dict(
        micro_batches=1, warmup=20, schedule="cosine", weight_decay=0.0, max_grad_norm=1.0
    )
    config.sft = ConfigDict(dict(steps=400, batch=64, lr=2e-3, **optimiser))
    lr = config_dict.placeholder(float) if paper else 3e-4
    config.dpo = ConfigDict(dict(batch=64, lr=lr, **optimiser))
    config.eval = ConfigDict(dict(n=256, samples=4, greedy=False, batch=128))
    config.checkpoint = ConfigDict(dict(every=100, keep=1))
    config.log = ConfigDict(dict(every=1, tensorboard=True, curves=True))
    config.log.wandb = config_dict.placeholder(str)  # project name; needs the extra "wandb"

    if size in ("smollm2", "gpu"):
        config.steps = 100
        config.model.path, config.model.shape = "smollm2", "smollm2"
        config.data.update(
            dict(generator="gsm_symbolic", n=2000, max_tokens=320, max_completion=160)
        )
        config.data.system = SMOLLM2
        config.sft.steps = 0
        config.online.update(
            dict(kind="iterative", every=100, samples=4, temperature=0.8, slots=32)
        )
        config.judge = "jaxrepro.rewards.judge:answer"
        config.loss.name = "sigmoid+sft"
        config.dpo.update(dict(batch=8, lr=5e-6))
        config.eval.update(dict(n=200, samples=0, greedy=True, batch=25))
        config.checkpoint.every = 25
    if size == "gpu":
        config.steps = 500
        config.model.dtype = "bfloat16"
        config.data.n = 20_000
        config.online.update(dict(every=125, samples=8, slots=256))
        config.dpo.batch = 32
        config.eval.update(dict(n=1000, batch=250))
    elif paper:
        path, name, tokens, _, _, shape = PAPER[config.study]
        config.steps = 478  # one epoch of 61 thousand pairs
        config.mesh = (1, 8, 1, 1)
        config.seed = 42
        config.model.path, config.model.shape = path, shape
        config.model.dtype, config.model.remat = "bfloat16", "full"
        config.data.update(dict(path=name, max_tokens=tokens, max_completion=tokens // 2))
        config.sft.steps = 0
        config.dpo.update(dict(batch=128, micro_batches=16, warmup=48))
        config.eval.update(dict(n=1000, samples=0, batch=64))
        config.checkpoint.every = 100
    elif size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    return config


def resolve(config: ConfigDict) -> ConfigDict:
    """Fills what a study decides and the user left untouched: SimPO's settings, DPO's, DPO's lr for other losses."""
    if not config.study:
        return config
    if config.study not in PAPER:
        raise ValueError(f"study {config.study!r} is not one of {', '.join(PAPER)}")
    (beta, ratio, simpo_lr), dpo_lr = PAPER[config.study][3:5]
    fill = {"dpo.lr": dpo_lr}
    if config.loss.name == "simpo":
        beta = beta if config.loss.beta is None else config.loss.beta
        fill = {"dpo.lr": simpo_lr, "loss.beta": beta, "loss.gamma": ratio * beta}
    elif config.loss.name == "sigmoid":
        fill["loss.beta"] = 0.01
    for name, value in fill.items():
        section, key = name.split(".")
        if config[section][key] is None:
            config[section][key] = value
    return config


TEN = {  # losses that are compared on the same data, seeds and warm-up; defaults of their papers but for beta
    "sigmoid": {},
    "ipo": {"loss.beta": 0.2},
    "hinge": {},
    "exo_pair": {"loss.label_smoothing": 1e-3},
    "nca_pair": {},
    "apo_zero": {},
    "sigmoid_norm": {"loss.beta": 1.0},
    "simpo": {"loss.beta": 2.0, "loss.gamma": 0.5},
    "orpo": {},
    "dpop": {"loss.lam": 5.0},
}


def get_claims(size: str = "tiny") -> dict:
    """Arms and pre-registered claims of a size; all arms of a seed start from one warm-up."""
    if size != "tiny":
        return {"arms": {"sigmoid": {}}, "claims": ()}
    arms = {name: {"loss.name": name} | more for name, more in TEN.items()}
    arms |= {
        "table": {"model.shape": "table", "steps": 2000, "loss.beta": 0.5},
        "flips_dpo": {"data.flips": 0.3},
        "flips_robust": {"data.flips": 0.3, "loss.name": "robust", "loss.label_smoothing": 0.3},
        "robust": {"loss.name": "robust", "loss.label_smoothing": 0.1},
        "length_dpo": {"data.annotator": "length"},
        "length_rdpo": {"data.annotator": "length", "loss.name": "rdpo_len", "loss.alpha": 0.1},
        "length_simpo": {"data.annotator": "length"} | {"loss.name": "simpo", **TEN["simpo"]},
        "length_ld": {"data.annotator": "length", "loss.ld_alpha": 0.5},
        "length_sampo": {"data.annotator": "length", "loss.name": "sampo"},
        "edit_dpo": {"data.annotator": "edit"},
        "edit_dpop": {"data.annotator": "edit", "loss.name": "dpop", "loss.lam": 5.0},
        "edit_apo_zero": {"data.annotator": "edit", "loss.name": "apo_zero"},
        "edit_sft": {"data.annotator": "edit", "loss.name": "sigmoid+sft"},
        "best_dpo": {"data.annotator": "best"},
        "best_ipo": {"data.annotator": "best", "loss.name": "ipo", "loss.beta": 0.2},
        "forward_kl": {"loss.divergence": "forward_kl"},
        "jensen_shannon": {"loss.divergence": "jensen_shannon"},
    }
    less = lambda arm, baseline, metric, says, name: {
        "name": name, "kind": "paired_difference", "direction": "<", "arm": arm,
        "baseline": baseline, "metric": metric, "says": says,
    }  # fmt: skip
    more = lambda *words: less(*words) | {"direction": ">"}
    longer, lower = "test/length_change", "test/chosen_lp_change"
    return {
        "seeds": 5,
        "prelude": {"steps": 0},
        "arms": arms,
        "claims": (
            {
                "name": "optimum",
                "kind": "threshold",
                "arm": "table",
                "metric": "after/table/tv",
                "direction": "<",
                "bound": 0.02,
                "says": "on infinitely many Bradley-Terry pairs DPO ends at ref exp(r / beta), total variation < 0.02",
            },
            more("flips_robust", "flips_dpo", "after/test/accuracy", "with 30 % of the labels turned round, rDPO is right on more held-out pairs than DPO", "noise"),
            {
                "name": "no noise",
                "kind": "equivalence",
                "arm": "robust",
                "baseline": "sigmoid",
                "metric": "after/test/accuracy",
                "margin": 0.03,
                "says": "without noise rDPO and DPO differ by less than 3 points",
            },
            {
                "name": "DPO grows",
                "kind": "threshold",
                "arm": "length_dpo",
                "metric": longer,
                "says": "an annotator with a taste for length makes DPO's samples longer",
            },
            *(
                less(f"length_{arm}", "length_dpo", longer, f"{name} grows less than DPO", f"length, {name}")
                for arm, name in (("rdpo", "R-DPO"), ("simpo", "SimPO"), ("ld", "LD-DPO"), ("sampo", "SamPO"))
            ),
            {
                "name": "DPO displaces",
                "kind": "threshold",
                "arm": "edit_dpo",
                "metric": lower,
                "direction": "<",
                "says": "on near-duplicates DPO lowers the log-probability of chosen answers",
            },
            *(
                more(f"edit_{arm}", "edit_dpo", lower, f"{name} lowers it less", f"displacement, {name}")
                for arm, name in (("dpop", "DPOP"), ("apo_zero", "APO-zero"), ("sft", "DPO + SFT"))
            ),
            less("best_ipo", "best_dpo", "after/test/kl", "where the better answer always wins, IPO (tau .2, token means) ends nearer to the start than DPO (beta .1)", "nearer"),
            more("forward_kl", "sigmoid", "after/test/entropy", "forward KL keeps more entropy than reverse KL", "entropy, forward KL"),
            more("jensen_shannon", "sigmoid", "after/test/entropy", "Jensen-Shannon keeps more entropy than reverse KL", "entropy, Jensen-Shannon"),
            *(
                {
                    "name": f"{name} wins",
                    "kind": "threshold",
                    "arm": name,
                    "metric": "after/test/win_rate",
                    "bound": 0.5,
                    "says": f"samples after {name} beat those of the start (KL beside it in the table)",
                }
                for name in TEN
            ),
        ),
    }  # fmt: skip
