"""KTO's warning about labels out of balance, with the weights that the loss has."""

import pytest

from jaxrepro.methods.dpo import registry, setting


def losses(name, **hyper):
    return tuple(registry.mix(name.split("+"), **hyper))


@pytest.mark.parametrize(
    ("name", "hyper", "warns"),
    [
        ("kto", {}, "weigh 3 to 1"),
        ("kto", {"lambda_u": 2.5}, None),  # 30 / (2.5 * 10) = 1.2
        ("kto", {"lambda_u": 2.0}, None),  # the end of the range
        ("kto", {"lambda_u": 1.9}, "weigh 1.58 to 1"),
        ("kto", {"lambda_d": 0.2}, "weigh 0.6 to 1"),
        ("kto", {"lambda_d": 0.0}, None),  # one side alone is meant
        ("apo_zero_unpaired", {}, "weigh 3 to 1"),
        ("bco", {}, None),  # has no such weights
    ],
)
def test_the_weights_of_the_loss_count(name, hyper, warns):
    records = [{"label": i < 30} for i in range(40)]
    found = setting.balances(losses(name, **hyper), records)
    assert [warns in note for note in found] == ([True] if warns else [])
