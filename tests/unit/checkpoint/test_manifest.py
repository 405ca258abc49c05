import pytest

from dapo_mcore.checkpoint.manifest import CorruptCheckpoint, verify_manifest, write_manifest


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "shard").write_bytes(bytes(range(200)))
    (tmp_path / "run.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def flip_one_bit(folder):
    content = bytearray((folder / "policy" / "shard").read_bytes())
    content[77] ^= 1
    (folder / "policy" / "shard").write_bytes(content)


DAMAGE = {
    "shard": flip_one_bit,
    "run.json": lambda folder: (folder / "run.json").unlink(),
    "stranger": lambda folder: (folder / "policy" / "stranger").write_text("x"),
    "no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json: not JSON": lambda folder: (folder / "manifest.json").write_text('{"run.json'),
    "shard: differs": lambda folder: (folder / "policy" / "shard").write_bytes(b"cut"),
}


def test_an_untouched_checkpoint_verifies(checkpoint):
    verify_manifest(checkpoint)


@pytest.mark.parametrize("named", DAMAGE)
def test_damage_is_found_and_its_file_named(checkpoint, named):
    DAMAGE[named](checkpoint)
    with pytest.raises(CorruptCheckpoint, match=named):
        verify_manifest(checkpoint)
