"""Paths of data and models are searched where the error says, and nowhere else."""

import pytest

from jaxrepro.config import UserError
from jaxrepro.data import locate


def test_data_is_found_as_given_and_below_the_variable(tmp_path, monkeypatch):
    (tmp_path / "maths").mkdir()
    monkeypatch.setenv(locate.VARIABLE, str(tmp_path))
    assert locate.data("maths") == tmp_path / "maths"
    assert locate.data(tmp_path / "maths") == tmp_path / "maths"


def test_missing_data_names_what_was_searched(tmp_path, monkeypatch):
    monkeypatch.delenv(locate.VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"data.path=nowhere: .*JAXREPRO_DATA is not set"):
        locate.data("nowhere")
    monkeypatch.setenv(locate.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path / "nowhere")):
        locate.data("nowhere")


def test_a_model_is_a_folder_or_one_line_of_error(tmp_path, monkeypatch):
    assert locate.model(tmp_path) == tmp_path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nobody/nothing-of-that-name", "not a name!"):
        with pytest.raises(UserError, match=r"^model.path=[^\n]*$"):
            locate.model(name)
