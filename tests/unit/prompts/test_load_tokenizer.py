import pytest

from dapo_mcore.prompts.tokenizer import load_tokenizer


def test_a_saved_tokenizer_is_loaded_from_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("1+1")["input_ids"] == tokenizer("1+1")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


def test_a_folder_without_a_tokenizer_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"model.path=.*no tokenizer there.*copy"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b"{}"])
def test_a_damaged_tokenizer_is_refused_by_file(tokenizer, tmp_path, damage):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(damage)
    with pytest.raises(ValueError, match="export the model again"):
        load_tokenizer(str(tmp_path))
