"""Settings and presets of BMF: what differs between them, and what is refused."""

import dataclasses

import pytest

from jaxrepro.config import UserError
from jaxrepro.methods.bmf import presets, setting
from jaxrepro.methods.bmf.setting import Setting, of_preset


def test_the_defaults_are_the_preset_fixed():
    assert Setting() == of_preset("fixed")
    assert hash(Setting()) == hash(of_preset("fixed"))


def test_presets_differ_exactly_in_the_fields_whose_reason_is_given():
    official, fixed = of_preset("official"), of_preset("fixed")
    differ = {
        f.name
        for f in dataclasses.fields(Setting)
        if getattr(official, f.name) != getattr(fixed, f.name)
    }
    assert differ == {*presets.DEPARTURES, "preset"}
    assert set(presets.OFFICIAL) == set(presets.FIXED) == set(presets.DEPARTURES)


def test_the_official_preset_has_the_numbers_of_the_official_code():
    s = of_preset("official")
    assert (s.groups, s.group_interval, s.latent, s.vae_hidden, s.hidden) == (4, 50, 32, 512, 256)
    assert (s.gamma, s.value_coef, s.entropy_coef, s.clip) == (0.95, 0.1, 0.08, 0.5)
    assert (s.lr, s.vae_lr, s.self_play_tau) == (1e-4, 1e-4, 0.01)
    assert s.towers == ("mean_field",) and not s.attends and not s.exclude_self


@pytest.mark.parametrize("name", setting.CHOICES)
def test_an_unknown_choice_is_refused_with_the_list_of_choices(name):
    with pytest.raises(ValueError, match=f"{name}='none' is not one of ") as caught:
        Setting(**{name: "none"})
    assert all(choice in str(caught.value) for choice in setting.CHOICES[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("groups", 0, "groups=0; use a whole number from 1 up"),
        ("groups", True, "groups=True; use a whole number from 1 up"),
        (
            "group_interval",
            0,
            "group_interval=0; use a whole number from 1 up; one beyond the horizon",
        ),
        ("latent", 0, "latent=0; use a whole number from 1 up"),
        ("gamma", 1.5, "gamma=1.5; use a number from 0 to 1"),
        ("self_play_tau", -0.1, "self_play_tau=-0.1; use a number from 0 to 1"),
        ("lr", 0.0, "lr=0.0; use a number above 0"),
        ("beta", float("nan"), "beta=nan; use a number from 0 up"),
        ("clip", float("inf"), "clip=inf; use a number from 0 up"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_limit(name, value, text):
    with pytest.raises(UserError, match=text.replace(".", r"\.")):
        Setting(**{name: value})


def test_what_contradicts_itself_is_refused():
    with pytest.raises(UserError, match=r"levels='intra' with mf_form='mixed'.*use 'bilevel'"):
        Setting(mf_form="mixed", levels="intra")
    with pytest.raises(UserError, match="gamma=0 divides by 0"):
        Setting(gamma=0.0)
    with pytest.raises(UserError, match="preset='paper' is not one of official, fixed"):
        of_preset("paper")
