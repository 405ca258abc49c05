import pytest

from dapo_mcore.desk import refuse_vision, require_space
from dapo_mcore.types import EncodedImage, Prompt


def test_a_disk_without_room_for_a_checkpoint_is_refused_by_option(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(ValueError, match=r"trainer\.output_dir=.*1,000,000,000,000 MB.*make room"):
        require_space(tmp_path, 10**18)


def test_prompts_with_pictures_end_the_run_with_one_error_and_text_does_not():
    text, seen = (Prompt(0, 0, (1,), "", "a", images=images) for images in ((), (EncodedImage(b"", 1, 1),)))
    refuse_vision([text])
    with pytest.raises(ValueError, match=r"data\.image_key: 1 of 2 prompts show pictures.*cannot be trained yet"):
        refuse_vision([text, seen])
