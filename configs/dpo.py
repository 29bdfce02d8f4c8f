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
    "smollm2": {"needs": "2 CPU cores, 8 GB, network once", "minutes": "60"},
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
    config.steps = 200
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
    # a workdir: the reference is its last parameters (kinds cached, live), not the start
    config.reference.init_from = config_dict.placeholder(str)
    config.judge = "jaxrepro.methods.dpo.world:judge"  # module:function; scores samples

    config.online = ConfigDict(
        dict(
            kind="",  # online_dpo, iterative, spin, sppo, xpo, selm, nash_md, ipo_md; "": data exists
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
    # earlier rounds that are learnt from too; None: 1 of spin, else 0
    config.online.keep = config_dict.placeholder(int)
    optimiser = dict(
        micro_batches=1, warmup=20, schedule="cosine", weight_decay=0.0, max_grad_norm=1.0
    )
    config.sft = ConfigDict(dict(steps=400, batch=64, lr=2e-3, **optimiser))
    lr = config_dict.placeholder(float) if paper else 3e-4
    config.dpo = ConfigDict(dict(batch=64, lr=lr, **optimiser))
    config.dpo.optimiser = config_dict.placeholder(str)  # adamw (None), rmsprop
    config.eval = ConfigDict(dict(n=256, samples=4, greedy=False, batch=128))
    config.checkpoint = ConfigDict(dict(every=100, keep=1))
    config.log = ConfigDict(dict(every=1, tensorboard=True, curves=True))
    config.log.wandb = config_dict.placeholder(str)  # project name; needs the extra "wandb"

    if size in ("smollm2", "gpu"):
        config.steps = 20
        config.model.path, config.model.shape = "smollm2", "smollm2"
        config.data.update(
            dict(generator="gsm_symbolic", n=2000, max_tokens=320, max_completion=160)
        )
        config.data.system = SMOLLM2
        # As it comes, the model solves 1 problem in 200: too few for pairs. After the warm-up it is 1 in 8.
        config.sft.update(dict(steps=150, batch=4, lr=2e-4))
        config.online.update(dict(kind="iterative", every=20, samples=4, temperature=0.8, slots=32))
        config.judge = "jaxrepro.rewards.judge:answer"
        config.loss.name = "sigmoid+sft"
        config.dpo.update(dict(batch=8, micro_batches=4, lr=5e-6, warmup=2))
        config.eval.update(dict(n=200, samples=0, greedy=True, batch=25))
        config.checkpoint.every = 25
    if size == "gpu":
        config.steps = 500
        config.model.dtype = "bfloat16"
        config.data.n = 20_000
        config.online.update(dict(every=125, samples=8, slots=256))
        config.sft.update(dict(steps=200, batch=32))
        config.dpo.update(dict(batch=32, micro_batches=1, warmup=20))
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
    fill, parts = {"dpo.lr": dpo_lr}, config.loss.name.split("+")
    if "simpo" in parts:
        beta = beta if config.loss.beta is None else config.loss.beta
        fill = {"dpo.lr": simpo_lr, "loss.beta": beta, "loss.gamma": ratio * beta}
    elif "sigmoid" in parts:
        fill["loss.beta"] = 0.01
    for name, value in fill.items():
        section, key = name.split(".")
        if config[section][key] is None:
            config[section][key] = value
    return config


TEN = {  # losses that are compared on the same data, seeds and warm-up: one setting each, not always a paper's
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
NEAR = 0.5  # beta of a DPO that stays nearer to its start: the control of losses that move less
LENGTH = {  # answers to an annotator with a taste for length
    "rdpo": ("R-DPO", {"loss.name": "rdpo_len", "loss.alpha": 0.1}),
    "simpo": ("SimPO", {"loss.name": "simpo"} | TEN["simpo"]),
    "ld": ("LD-DPO", {"loss.ld_alpha": 0.5}),
    "sampo": ("SamPO", {"loss.name": "sampo"}),
}
EDIT = {  # answers to pairs that differ in one letter
    "dpop": ("DPOP", {"loss.name": "dpop"} | TEN["dpop"]),
    "apo_zero": ("APO-zero", {"loss.name": "apo_zero"}),
    "sft": ("DPO + SFT", {"loss.name": "sigmoid+sft"}),
}


def _arms() -> dict:
    arms = {name: {"loss.name": name} | more for name, more in TEN.items()}
    arms |= {f"sigmoid_{100 * beta:.0f}": {"loss.beta": beta} for beta in (0.03, 0.3, 1.0)}
    arms |= {"table": {"model.shape": "table", "steps": 2000, "loss.beta": 0.5}}
    best = {"model.shape": "table", "data.annotator": "best"}
    for name, beta in (("sigmoid", 0.5), ("ipo", 0.2)):
        loss = {"loss.name": name, "loss.beta": beta}
        arms |= {f"best_{name}_{n}": best | {"steps": n} | loss for n in (2000, 8000)}
    robust = lambda flips, e: {
        "data.flips": flips,
        "loss.name": "robust",
        "loss.label_smoothing": e,
    }
    arms |= {"robust": robust(0.0, 0.1), "flips_40_half": robust(0.4, 0.2)}
    for flips in (20, 40):
        arms[f"flips_{flips}"] = {"data.flips": flips / 100}
        arms[f"flips_{flips}_robust"] = robust(flips / 100, flips / 100)
    for annotator, curbs in (("length", LENGTH), ("edit", EDIT)):
        by = {"data.annotator": annotator}
        arms |= {f"{annotator}_dpo": by, f"{annotator}_near": by | {"loss.beta": NEAR}}
        arms |= {f"{annotator}_{key}": by | loss for key, (_, loss) in curbs.items()}
    told = {"loss.name": "rdpo_len", "loss.alpha": 0.5}  # data.bias itself
    arms["length_told"] = {"data.annotator": "length"} | told
    return arms | {kind: {"loss.divergence": kind} for kind in ("forward_kl", "jensen_shannon")}


def get_claims(size: str = "tiny") -> dict:
    """Arms and claims of a size, written before its runs but for "collapse" and "R-DPO told" (see the README).

    All arms of a seed start from one warm-up. `python -m jaxrepro.methods.dpo.frontier` sets the ten losses beside
    DPO's own line of win rate against KL.
    """
    if size != "tiny":
        return {"arms": {"sigmoid": {}}, "claims": ()}
    right, grown, lower = "after/test/accuracy", "test/length_change", "test/chosen_lp_change"
    entropy, wins, kl = "after/test/entropy", "after/test/win_rate", "after/table/kl"

    def more(name, arm, baseline, metric, says, direction=">"):
        return dict(
            name=name, kind="paired_difference", arm=arm, baseline=baseline, metric=metric,
            direction=direction, says=says,
        )  # fmt: skip

    def less(*words):
        return more(*words, direction="<")

    def above(name, arm, metric, says, bound=0.0, direction=">"):
        return dict(
            name=name, kind="threshold", arm=arm, metric=metric, bound=bound, direction=direction, says=says
        )  # fmt: skip

    def same(name, arm, baseline, metric, margin, says):
        return dict(
            name=name, kind="equivalence", arm=arm, baseline=baseline, metric=metric, margin=margin, says=says
        )  # fmt: skip

    claims = [
        above("optimum", "table", "after/table/tv", "on infinitely many Bradley-Terry pairs DPO ends at ref exp(r / beta), total variation < 0.02", 0.02, "<"),
        more("no bound", "best_sigmoid_8000", "best_sigmoid_2000", kl, "where the better answer always wins, DPO (beta .5) is further from its start after 8,000 steps than after 2,000: a table of answers, no sampling error"),
        above("collapse", "best_sigmoid_8000", "after/table/entropy", "there DPO ends with its mass on one answer: entropy below 0.1 nats", 0.1, "<"),
        same("bound", "best_ipo_8000", "best_ipo_2000", kl, 0.01, "there IPO (tau .2) has come to rest"),
        *(
            more(f"noise, {flips} %", f"flips_{flips}_robust", f"flips_{flips}", right, f"with {flips} % of the labels turned round, rDPO that is told so is right on more held-out pairs than DPO")
            for flips in (20, 40)
        ),
        more("noise, half told", "flips_40_half", "flips_40", right, "with 40 % turned round, rDPO that is told 20 % is right more often than DPO"),
        same("no noise", "robust", "sigmoid", right, 0.03, "without noise rDPO (e .1) and DPO differ by less than 3 points"),
        above("DPO grows", "length_dpo", grown, "an annotator with a taste for length makes DPO's samples longer"),
        *(
            less(f"length, {name}{than}", f"length_{key}", f"length_{base}", grown, f"{name} grows less than {whom}")
            for key, (name, _) in LENGTH.items()
            for than, base, whom in (("", "dpo", "DPO"), (" against near DPO", "near", f"DPO of beta {NEAR}, which moves less"))
        ),
        less("length, R-DPO told", "length_told", "length_dpo", grown, "R-DPO whose alpha is the annotator's own weight of length grows less than DPO"),
        above("DPO displaces", "edit_dpo", lower, "on near-duplicates DPO lowers the log-probability of chosen answers", direction="<"),
        *(
            more(f"displacement, {name}{than}", f"edit_{key}", f"edit_{base}", lower, f"{name} lowers it less than {whom}")
            for key, (name, _) in EDIT.items()
            for than, base, whom in (("", "dpo", "DPO"), (" against near DPO", "near", f"DPO of beta {NEAR}, which moves less"))
        ),
        more("entropy, forward KL", "forward_kl", "jensen_shannon", entropy, "forward KL keeps more entropy than Jensen-Shannon"),
        more("entropy, Jensen-Shannon", "jensen_shannon", "sigmoid", entropy, "Jensen-Shannon keeps more entropy than reverse KL"),
        above("DPO wins", "sigmoid", wins, "samples after DPO beat those of the start", 0.5),
        *(
            more(f"{name} against DPO", name, "sigmoid", wins, f"samples after {name} beat the start's more often than those after DPO (one setting each, KL beside it)")
            for name in TEN
            if name != "sigmoid"
        ),
        less("temperature", "sigmoid_100", "sigmoid", "after/test/kl", "DPO of beta 1 ends nearer to the start than DPO of beta .1"),
    ]  # fmt: skip
    show = tuple(
        f"after/test/{name}"
        for name in ("accuracy", "win_rate", "kl", "score", "length", "entropy")
    )
    return {
        "seeds": 5,
        "prelude": {"steps": 0},
        "arms": _arms(),
        "claims": tuple(claims),
        "show": show,
    }
