"""SOC (arXiv:2504.07527): one auxiliary term of fine-tuning makes beam search prefer what was demonstrated.

Claim of the paper: adding L_V = -E[logsumexp of the logits] with weight 0.2 to the cross-entropy cures the
over-optimism of beam search, at no cost when answering. No code of the authors was found.

  python -m jaxrepro.launch --config=configs/soc.py               tiny: 2 CPU cores, 3 minutes
  python -m jaxrepro.launch --config=configs/soc.py:smollm2       a real model on 2 CPU cores
  python -m jaxrepro.launch --config=configs/soc.py:gpu           GSM8K on one 80 GB GPU (unmeasured)
  python -m jaxrepro.launch --config=configs/soc.py:paper_3b_alpha    the paper's models and data (unmeasured)

`--config.soc.lam=0` is plain SFT; `--config.soc.variant=centred` (smoothing, entropy, contrastive) a control;
`--config.decode.beams=1,5,10` the widths. `tiny` trains 0.4 million parameters from scratch on sums of three
digits written as a chain of carries, of which 5 % have a carry in the last digit; `python -m
jaxrepro.reproduce --config=configs/soc.py:tiny` runs all arms. `smollm2` and `gpu` fetch or take a model;
data.path and eval.sets take JSONL files, folders and hub names. In `paper_*`, what the paper does not report
(optimiser, batch, epochs, lengths, filters of the data) is inferred.
"""

from ml_collections import ConfigDict, config_dict

PAPER = {  # size: shape, checkpoint, devices, micro-batches
    "1p5b": ("qwen2_1_5b", "Qwen/Qwen2-1.5B", 8, 2),
    "3b": ("qwen2_5_3b", "Qwen/Qwen2.5-3B", 8, 2),
    "7b": ("qwen2_5_7b", "Qwen/Qwen2.5-7B", 16, 4),
}
DATA = {  # data.path, data.format, steps: three epochs of 10.3 and 2.8 thousand items
    "alpha": ("xinlai/Math-Step-DPO-10K", "math_step_dpo", 483),
    "beta": (
        "rasbt/math_full_minus_math500",
        "math",
        131,
    ),  # MATH's 12,000 problems that are not in MATH-500
}
SIZES = {
    "tiny": {"needs": "2 CPU cores, 2 GB", "minutes": "3"},
    "smollm2": {"needs": "2 CPU cores, 10 GB, network once", "minutes": "70 (an estimate)"},
    "gpu": {"needs": "one 80 GB GPU, Qwen2.5-1.5B, GSM8K", "minutes": "10-30 (unmeasured)"},
} | {
    f"paper_{size}_{data}": {
        "needs": f"{devices} x 80 GB, {path.partition('/')[2]}, {DATA[data][0]}",
        "minutes": "hours (unmeasured)",
    }
    for size, (_, path, devices, _) in PAPER.items()
    for data in DATA
}
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
TEST_SETS = (
    "openai/gsm8k",
    "HuggingFaceH4/MATH-500",
    "gaokao2023en_test.jsonl",
)  # the last: a file


def get_config(size: str = "tiny") -> ConfigDict:
    """The configuration of one size."""
    config = ConfigDict()
    config.method = "soc"
    config.seed = 0
    config.steps = 600  # 0: the base model is evaluated
    config.mesh = (1, 1, 1, 1)  # data, fsdp, sequence, tensor
    config.init_from = config_dict.placeholder(str)  # a workdir: start from its last parameters

    config.soc = soc = ConfigDict()
    soc.lam = 0.2  # weight of L_V; 0 is plain SFT
    soc.variant = "soc"  # soc, centred, smoothing, entropy, contrastive
    soc.normalise = "token"  # token: every token weighs the same; sequence: every answer
    soc.loss_on_prompt = False
    soc.allow_degenerate = False  # lets lam outside [0, 1) through, to show what happens
    soc.corrupt = 0.15  # share of response tokens that the contrastive variant replaces
    soc.z_loss = 0.0  # of plain SFT alone: both work against lam
    soc.label_smoothing = 0.0

    config.model = model = ConfigDict()
    model.path = config_dict.placeholder(str)  # folder, .gguf file, hub name, or smollm2
    model.shape = (
        "tiny_2"  # for --dry_run; a tiny one is also what is trained where there is no path
    )
    model.dtype = "float32"
    model.remat = "none"
    # rank 0: all parameters are trained; targets: a regular expression on layers/{wq,wk,wv,wo,gate,up,down}
    config.lora = ConfigDict(dict(rank=0, alpha=16.0, targets="layers/.*", init="kaiming"))

    config.data = data = ConfigDict()
    data.path = config_dict.placeholder(str)  # JSONL file, folder, or hub name; else the generator
    data.subset = config_dict.placeholder(str)  # of a hub name
    data.split = "train"  # of a hub name: what is trained on
    data.format = "questions"  # questions, math_step_dpo, math
    data.level = 5  # of data.format math
    data.generator = "addition"  # addition, gsm_symbolic
    data.n = 3000  # training items that are generated
    data.rare = 0.05  # share of sums with a carry in the last digit
    data.max_tokens = 48  # of a row; longer training items are left out
    data.max_completion = 32  # tokens of an answer, its end included: of a row, and when answering
    data.system = ""  # "" = no system turn; some templates take none

    config.sft = ConfigDict(
        dict(
            batch=64,
            micro_batches=1,
            lr=1e-3,
            warmup=20,
            schedule="cosine",
            weight_decay=0.0,
            b2=0.99,
            max_grad_norm=1.0,
        )
    )
    config.decode = decode = ConfigDict()
    decode.beams = (1, 2, 5, 10)  # widths; 1 is greedy decoding
    decode.width = 5  # of the headline beam, whose variations follow
    decode.length_penalty = 1.0  # of all widths: score = log-probability / length ** penalty
    decode.penalties = (0.0, 0.6)
    decode.temperatures = (0.5, 0.7)  # of the scores: sharpening after training instead of in it
    decode.votes = 0  # samples of a majority vote; 0 = none
    decode.vote_temperature = 1.0
    decode.rerank = True  # also by the diagnostic scores, among the headline beam's hypotheses
    config.eval = ConfigDict(
        dict(n=500, batch=125, shots=(0,))
    )  # shots: worked items in the prompt
    config.eval.sets = ()  # paths of test sets; none: items held out of the training data
    config.checkpoint = ConfigDict(dict(every=200, keep=1))
    config.log = ConfigDict(dict(every=1, tensorboard=True, curves=True))
    config.log.wandb = config_dict.placeholder(str)  # project name; needs the extra "wandb"

    if size == "tiny":
        return config
    config.data.system, config.eval.shots = BOXED, (0, 4)
    if size == "smollm2":
        config.steps = 150
        config.model.path, config.model.shape = "smollm2", "smollm2"
        config.data.update(dict(generator="gsm_symbolic", n=8000))
        config.data.update(dict(max_tokens=256, max_completion=160))
        config.sft.update(dict(batch=4, lr=5e-5))
        config.decode.update(dict(beams=(1, 5), penalties=(), temperatures=(0.7,)))
        config.eval.update(dict(n=100, batch=20, shots=(0,)))
        config.checkpoint.every = 50
        return config
    config.model.dtype, config.model.remat = "bfloat16", "full"
    config.sft.update(dict(batch=64, lr=1e-5, b2=0.999))
    config.decode.beams = (1, 2, 3, 5, 8, 10)
    if size == "gpu":
        config.steps = 233  # two epochs
        config.model.path, config.model.shape = "Qwen/Qwen2.5-1.5B", "qwen2_1_5b"
        config.data.path = "openai/gsm8k"
        config.data.update(dict(max_tokens=1024, max_completion=512))
        config.sft.update(dict(micro_batches=4, warmup=7))
        config.decode.update(dict(beams=(1, 5), penalties=(), temperatures=(0.7,)))
        config.eval.update(dict(n=300, batch=75, sets=TEST_SETS[:2]))
        config.checkpoint.every = 100
        return config
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    _, which, name = size.split("_")
    shape, path, devices, micro_batches = PAPER[which]
    config.model.path, config.model.shape = path, shape
    config.mesh = (1, devices, 1, 1)
    config.data.path, config.data.format, config.steps = DATA[name]
    config.data.update(dict(max_tokens=2048, max_completion=1024))
    config.sft.update(dict(micro_batches=micro_batches, warmup=round(0.03 * config.steps)))
    config.eval.update(dict(n=1319, batch=64, sets=TEST_SETS))
    config.checkpoint.update(dict(every=50, keep=2))
    return config


def get_claims(size: str = "tiny") -> dict:
    """Arms and pre-registered claims of a size: directions, whose verdicts are reported as they come."""
    if size != "tiny":
        return {"arms": {"sft": {"soc.lam": 0.0}, "soc": {}}, "claims": ()}
    beam, gain = "test/beam5/accuracy", "test/beam5_minus_greedy"
    arms = {"sft": {"soc.lam": 0.0}}
    arms |= {f"soc_0{10 * lam:.0f}": {"soc.lam": lam} for lam in (0.1, 0.2, 0.3)}
    arms |= {variant: {"soc.variant": variant} for variant in ("centred", "entropy")}
    difference = {"kind": "paired_difference", "arm": "soc_02", "baseline": "sft", "metric": beam}
    decoders = "greedy", "beam2", "beam5", "beam10"
    kinds = "accuracy", "accuracy_common", "accuracy_rare", "over_opt_rate"
    return {
        "seeds": 5,
        "arms": arms,
        "show": tuple(f"test/{decoder}/{kind}" for kind in kinds for decoder in decoders),
        "claims": (
            *(
                difference
                | {
                    "name": f"SOC {lam} helps a beam of 5",
                    "arm": arm,
                    "says": f"with lam = {lam} a beam of 5 is right more often than with SFT",
                }
                for lam, arm in ((0.1, "soc_01"), (0.2, "soc_02"), (0.3, "soc_03"))
            ),
            difference
            | {
                "name": "more for beams than for greedy",
                "metric": gain,
                "says": "what a beam of 5 adds to greedy decoding is more after SOC than after SFT",
            },
            difference
            | {
                "name": "less over-optimism",
                "metric": "test/beam5/over_opt_rate",
                "direction": "<",
                "says": "fewer wrong answers score above the worked solution",
            },
            difference
            | {
                "name": "wider is less harmful",
                "metric": "test/slope",
                "says": "accuracy falls less, or rises more, per doubling of the width",
            },
            difference
            | {
                "name": "rare states",
                "metric": "test/beam5/accuracy_rare",
                "says": "sums with the rare carry are right more often",
            },
            difference
            | {
                "name": "greedy does not suffer",
                "metric": "test/greedy/accuracy",
                "bound": -0.02,
                "says": "greedy decoding loses less than 2 points",
            },
            difference
            | {
                "name": "more than the drift-free loss",
                "baseline": "centred",
                "says": "SOC beats its centred form, which has the same fixed point",
            },
            difference
            | {
                "name": "more than an entropy penalty",
                "baseline": "entropy",
                "says": "SOC beats an entropy penalty of the same weight",
            },
            difference
            | {
                "name": "more than sharpening after training",
                "baseline_metric": "test/beam5_tau0.7/accuracy",
                "says": "SOC beats SFT whose beams are ranked at temperature 0.7",
            },
        ),
    }
