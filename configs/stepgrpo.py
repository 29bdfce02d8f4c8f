"""StepGRPO (R1-VL, arXiv:2503.12937): a vision-language model learns from step-wise rule rewards.

Claim of the paper: two rule rewards, key-step coverage (StepRAR) and structural validity (StepRVR),
densify the signal of GRPO without a process reward model.

  python -m jaxrepro.launch --config=configs/stepgrpo.py             tiny: 2 CPU cores, < 10 minutes
  python -m jaxrepro.launch --config=configs/stepgrpo.py:gpu         one 80 GB GPU (unmeasured)
  python -m jaxrepro.launch --config=configs/stepgrpo.py:paper_2b --config.model.path=MODEL \\
      --config.data.path=FOLDER     8 x 80 GB (unmeasured); paper_7b likewise, 16 x 80 GB

MODEL is a Hugging Face folder of Qwen2-VL; FOLDER holds sft.jsonl, rl.jsonl, validation.jsonl and
test.jsonl in R1-VL's schema. `tiny` trains 0.9 million parameters from scratch on real handwritten
digits: a base stage that stands in for pretraining (captions and text-only equations), a warm-up SFT
that stops at the first validation accuracy >= 0.50, then 120 StepGRPO updates. Measured over five
seeds: held-out accuracy +20.9 points [17.2, 24.6] (RESULTS.md).
"""

from ml_collections import ConfigDict, config_dict

from jaxrepro.methods.stepgrpo.presets import PRESETS

SIZES = {
    "tiny": {"needs": "2 CPU cores, 4 GB", "minutes": "10"},
    "gpu": {"needs": "one 80 GB GPU", "minutes": "10-30 (unmeasured)"},
    "paper_2b": {"needs": "8 x 80 GB, Qwen2-VL-2B-Instruct, data", "minutes": "days (unmeasured)"},
    "paper_7b": {"needs": "16 x 80 GB, Qwen2-VL-7B-Instruct, data", "minutes": "days (unmeasured)"},
}


def get_config(size: str = "tiny") -> ConfigDict:
    """The configuration of one size; `resolve` completes it after the overrides."""
    config = ConfigDict()
    config.method = "stepgrpo"
    config.seed = 0
    config.steps = 120  # RL updates, 16 questions each
    config.mesh = (1, 1, 1, 1)  # data, fsdp, sequence, tensor
    config.init_from = config_dict.placeholder(str)  # a finished warm-up: skips base and sft

    config.preset = "paper"
    kinds = {"temperature": float, "top_k": int}  # None in a preset: the size's own
    config.behaviour = ConfigDict(
        {
            name: config_dict.placeholder(kinds.get(name, type(value)))
            for name, value in PRESETS["paper"].items()
        }
    )
    config.arm = "stepgrpo"  # stepgrpo, outcome, outcome_format, no_steprar, no_steprvr, sft

    config.model = model = ConfigDict()
    model.path = config_dict.placeholder(str)  # folder or hub name of a Qwen2-VL
    model.shape = "tiny"  # tiny, small, 2b, 7b
    model.dtype = "float32"
    model.remat = "none"

    config.data = data = ConfigDict()
    data.path = config_dict.placeholder(str)  # folder of JSONL files; None: the generator
    data.generator = "digits"  # digits, grid_count, toy_chart
    data.min_pixels, data.max_pixels = 3136, 400_000
    data.max_prompt = config_dict.placeholder(int)  # tokens; None: what the generator needs.
    data.max_completion = config_dict.placeholder(int)  # Longer examples are never cut.
    data.instruction = False  # put the instruction that describes the format before the question
    data.corrupt = 0.15  # share of generated warm-up targets with a broken format

    config.base = ConfigDict(  # of generated examples only
        dict(steps=600, batch=32, lr=1e-3, warmup=20, b2=0.99, captions=0.85, max_completion=12)
    )
    config.sft = ConfigDict(
        dict(
            steps=900,
            batch=32,
            micro_batches=1,
            lr=5e-4,
            warmup=20,
            schedule="constant",
            weight_decay=0.0,
            b2=0.99,
            freeze=(),
            stop_accuracy=0.5,  # first validation accuracy that ends the warm-up; 0 = never
            check_every=10,
        )
    )
    config.rl = ConfigDict(
        dict(
            batch=16,
            samples=8,
            micro_batches=1,
            temperature=1.0,
            lr=3e-4,
            warmup=5,
            schedule="constant",
            weight_decay=0.0,
            b2=0.999,
            max_grad_norm=1.0,
            freeze=(),
            beta=0.04,
            alpha=0.1,
            advantage="grpo",  # grpo, dr_grpo, batch_std, rloo, gdpo
            loss="grpo",  # grpo, bnpo, dapo, dr_grpo, gspo
        )
    )
    config.checkpoint = ConfigDict(dict(every=50, keep=1))
    config.log = ConfigDict(dict(every=1, tensorboard=True, curves=True))
    config.log.wandb = config_dict.placeholder(str)  # project name; needs the extra "wandb"
    config.eval = ConfigDict(dict(every=0, n=512, validation_n=256, batch=128))
    config.eval.instruction = config_dict.placeholder(bool)  # None: as data.instruction
    config.eval.max_completion = config_dict.placeholder(int)  # None: data.max_completion
    config.eval.yes_no = config_dict.placeholder(bool)  # choices a, b are Yes, No (HallusionBench)

    if size == "gpu":
        # 40-80 million parameters on rendered bar charts.
        config.data.generator = "toy_chart"
        config.base.max_completion = 60
        config.model.shape, config.model.dtype = "small", "bfloat16"
        config.steps = 300
        config.base.update(dict(steps=1500, batch=64, lr=5e-4, warmup=100))
        config.sft.update(dict(steps=4000, batch=64, lr=3e-4, warmup=100, check_every=50))
        config.rl.update(dict(batch=64, lr=1e-4, warmup=10, micro_batches=4))
        config.checkpoint.every = 100
    elif size in ("paper_2b", "paper_7b"):
        big = size == "paper_7b"
        config.model.shape, config.model.dtype, config.model.remat = (
            "7b" if big else "2b",
            "bfloat16",
            "full",
        )
        config.mesh = (1, 4, 1, 4) if big else (1, 4, 1, 2)  # a batch is 4 questions: 4 on fsdp
        config.data.max_prompt, config.data.max_completion, config.data.corrupt = 1024, 1024, 0.0
        config.base.steps = 0
        config.steps = 2500  # 10K questions, one epoch, 4 a batch
        # Mulberry-260k, two epochs of batch 128; the paper's learning rates.
        config.sft.update(
            dict(
                steps=4062,
                batch=128,
                micro_batches=16,
                lr=5e-6 if big else 1e-5,
                warmup=122,
                schedule="cosine",
            )
        )
        config.sft.update(dict(b2=0.999, freeze=("vision",), stop_accuracy=0.0, check_every=0))
        config.rl.update(
            dict(batch=4, samples=4, temperature=1.2, lr=1e-6, warmup=0, schedule="linear")
        )
        config.checkpoint.update(dict(every=100, keep=2))
        config.eval.update(dict(every=0, n=1000, validation_n=0, batch=16))
        config.eval.instruction, config.eval.max_completion = True, 2048
    elif size != "tiny":
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    return config


def resolve(config: ConfigDict) -> ConfigDict:
    """Fills what the preset decides and the user left untouched."""
    if config.preset not in PRESETS:
        raise ValueError(f"preset {config.preset!r} is not one of {', '.join(PRESETS)}")
    for name, value in PRESETS[config.preset].items():
        if config.behaviour[name] is None:
            config.behaviour[name] = value
    return config


def get_claims(size: str = "tiny") -> dict:
    """Arms and pre-registered claims of a size; all arms of a seed start from one warm-up."""
    if size != "tiny":
        return {"arms": {"stepgrpo": {}}, "claims": ()}
    accuracy, validity = "after/test/accuracy", "after/test/sampled_validity"
    arms = ("stepgrpo", "outcome", "outcome_format", "no_steprar", "no_steprvr", "sft")
    difference = {"kind": "paired_difference", "arm": "stepgrpo"}
    return {
        "seeds": 5,
        "common": {"steps": 60},
        "prelude": {"steps": 0},
        "arms": {arm: {"arm": arm} for arm in arms}
        | {"main": {"steps": 120}, "main_sft": {"steps": 120, "arm": "sft"}},
        "claims": (
            difference
            | {
                "name": "gain",
                "arm": "main",
                "metric": accuracy,
                "baseline": "main",
                "baseline_metric": "before/test/accuracy",
                "bound": 0.10,
                "says": "120 StepGRPO updates raise held-out accuracy by more than 10 points",
            },
            {
                "name": "no seed loses",
                "kind": "every_seed",
                "arm": "main",
                "metric": accuracy,
                "baseline": "main",
                "baseline_metric": "before/test/accuracy",
                "says": "no seed ends below its own start",
            },
            difference
            | {
                "name": "denser signal",
                "metric": "rl/zero_std_first",
                "baseline": "outcome",
                "direction": "<",
                "says": "step-wise rewards leave fewer groups without a gradient in the first 10 updates",
            },
            {
                "name": "valid samples",
                "kind": "threshold",
                "arm": "stepgrpo",
                "metric": validity,
                "bound": 0.95,
                "says": "more than 95 % of temperature-1 samples end up valid",
            },
            difference
            | {
                "name": "more valid than outcome-only",
                "metric": validity,
                "baseline": "outcome",
                "says": "samples are valid more often than after outcome-only GRPO",
            },
            {
                "name": "accuracy equals outcome-only",
                "kind": "equivalence",
                "arm": "stepgrpo",
                "metric": accuracy,
                "baseline": "outcome",
                "margin": 0.05,
                "says": "no accuracy difference from outcome-only GRPO at this size, margin 5 points",
            },
            *(
                difference | {"name": name, "metric": accuracy, "baseline": arm, "says": says}
                for name, arm, says in (
                    ("StepRAR helps", "no_steprar", "accuracy is higher with StepRAR than without"),
                    ("StepRVR helps", "no_steprvr", "accuracy is higher with StepRVR than without"),
                    ("better than continued SFT", "sft", "accuracy beats SFT for as many updates"),
                )
            ),
            difference
            | {
                "name": "better than continued SFT, 120 updates",
                "arm": "main",
                "metric": accuracy,
                "baseline": "main_sft",
                "says": "the same for the main run's 120 updates",
            },
        ),
    }
