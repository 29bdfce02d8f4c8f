"""The language model's benchmark: its limits by hand, and the tables of one run."""

import pytest

from jaxrepro.bench import lm

TEXT = dict(vocab=32, d=8, layers=2, heads=4, kv=2, head_dim=4, ffn=16, rope_theta=1e4, eps=1e-6)
SHAPE = {
    "text": TEXT | {"qkv_bias": True},
    "dtype": "bfloat16",
    "remat": "none",
    "prompt": 4,
    "greedy": [[3, 6]],
    "beam": [2, 2, 4],
    "train": [2, 8],
    "lr": 1e-4,
    "peer": False,
    "limits": True,
}
# A layer: 8 x 16 for q and o, 8 x 8 for k and v, 16 + 8 + 8 biases, 3 of 8 x 16, 2 norms of 8.
# Two of them, the tied embedding of 32 x 8, and the last norm.
COUNT = 2 * (2 * 128 + 2 * 64 + 32 + 3 * 128 + 16) + 256 + 8
TOKEN = 2 * 2 * 2 * 4 * 2  # bytes of keys and values: 2 layers of 2 heads of 4 numbers
# 16 tokens. Attention of a head: two products of 2 x 4 FLOPs a pair of tokens, half of 8 x 8 pairs a row;
# with the backward pass three times as much.
STEP = 6 * COUNT * 16 + 3 * (2 * 4) * (2 * 2 * 4) * (2 * 8 * 8 / 2)


def test_a_decode_step_reads_weights_and_caches_once():
    assert (COUNT, TOKEN) == (1896, 64)
    assert lm.floor_seconds(lm.config(SHAPE), 3, 10.0, 1e3) == pytest.approx(5.712)


def test_a_training_step_is_six_flops_a_parameter_and_token_and_causal_attention():
    assert STEP == 182016 + 24576
    assert lm.step_flops(lm.config(SHAPE), 2, 8) == STEP


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_data_sheet(kind, peak):
    assert lm.peak_flops(kind) == peak


@pytest.mark.slow
def test_a_run_has_rates_and_shares_of_the_limits(monkeypatch):
    monkeypatch.setattr(lm, "limits", lambda: {"bytes": 1e3, "flops": 1e6})
    monkeypatch.setattr(lm, "PEAKS", {"cpu": 4e6})
    report = lm.bench(SHAPE, 2)
    groups = {(g["what"], g["unit"]): g["cases"] for g in report.groups}
    greedy, beam = "greedy, 3 rows", "beam search, 2 rows x 2 beams"
    train = "training step, 2 x 8 tokens"
    assert list(groups) == [
        (greedy, "tokens/s"),
        (greedy, "share of the limit"),
        (beam, "tokens/s"),
        (train, "s"),
        (train, "share of the limit"),
        (train, "MFU"),
    ]
    floor = 6 * (2 * COUNT + 3 * (4 + 6 / 2) * TOKEN) / 1e3
    for what, unit, work in [
        (greedy, "tokens/s", 3 * 6),
        (greedy, "share of the limit", floor),
        (beam, "tokens/s", 2 * 4),
        (train, "share of the limit", STEP / 1e6),
        (train, "MFU", STEP / 4e6),
    ]:
        (case,) = groups[what, unit]
        rates = [work / s for s in case["seconds"]]
        assert len(rates) == 2 and case["median"] == pytest.approx(sum(rates) / 2)
    (seconds,) = groups[train, "s"]
    assert seconds["seconds"] == groups[train, "MFU"][0]["seconds"] and seconds["ratio"] is None


class Instant:
    """Calls that do nothing, in place of the compiled ones."""

    def __init__(self, params, cfg, shape):
        self.params = params

    def train(self, *_):
        return lambda: None

    greedy = beam = train


def test_an_unknown_device_has_the_measured_share_alone(monkeypatch):
    monkeypatch.setattr(lm, "limits", lambda: {"bytes": 1e3, "flops": 1e6})
    monkeypatch.setattr(lm, "Ours", Instant)
    report = lm.bench(SHAPE, 1)
    assert [g["unit"] for g in report.groups if g["what"].startswith("training")] == [
        "s",
        "share of the limit",
    ]
    assert not any("MFU" in note for note in report.notes)
