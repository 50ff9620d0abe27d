"""Token sources and the sampler: what each rank sees, and that it does not depend on ranks or on interruptions."""

import json

import numpy as np
import pytest
import torch

from moeweave.launch import data
from moeweave.launch.sampler import Sampler
from moeweave.launch.schema import ConfigError, DataConfig


def tokens_of(path, **rest):
    return data.open_tokens(DataConfig(path=str(path), **rest))


def test_the_default_source_is_english_that_python_carries():
    tokens = data.open_tokens(DataConfig())
    text = bytes(tokens.ids_N[:100_000]).decode(errors="replace")
    assert len(tokens) > 300_000
    assert text.count(" the ") > 300


def test_a_text_file_is_its_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes("héllo".encode())
    assert tokens_of(tmp_path / "a.txt").ids_N.tolist() == list("héllo".encode())


def test_json_lines_give_one_field_with_a_zero_between(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "ab", "n": 1}) + "\n\n" + json.dumps({"body": "c"}) + "\n")
    assert bytes(tokens_of(path, field="body").ids_N) == b"ab\0c"


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_memmaps_of_both_widths(tmp_path, dtype):
    ids = np.array([5, 65_000 if dtype == "uint16" else 70_000, 0], dtype=dtype)
    np.save(tmp_path / "a.npy", ids)
    ids.tofile(tmp_path / "a.bin")
    for name in ("a.npy", "a.bin"):
        got = tokens_of(tmp_path / name, dtype=dtype).ids_N
        assert isinstance(got, np.memmap)
        assert got.tolist() == ids.tolist()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pdf", b"x", "must end in one of .txt, .jsonl, .npy, .bin"),
        ("a.txt", b"", "the file is empty"),
        ("a.bin", b"abc", "no whole number of uint16"),
        ("a.npy", b"not numpy", "not a NumPy array"),
        ("a.npy", b"", "not a NumPy array"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 has no field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' is no text"),
    ],
)
def test_a_file_that_holds_no_tokens_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        tokens_of(tmp_path / name)


def test_an_array_of_another_kind_is_refused_with_what_it_is(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    with pytest.raises(ConfigError, match=r"is float64 of shape \(2, 3\), must be one row of uint16 or uint32"):
        tokens_of(tmp_path / "a.npy")


def test_a_missing_file_names_what_the_folder_holds(tmp_path):
    (tmp_path / "book.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"boook.txt: no such file; .* holds book.txt"):
        tokens_of(tmp_path / "boook.txt")
    with pytest.raises(ConfigError, match="does not exist either"):
        tokens_of(tmp_path / "nowhere" / "book.txt")


def test_too_few_tokens_or_too_small_a_vocabulary_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    tokens = tokens_of(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match=r"has 5 tokens, fewer than data\.seq_length=8"):
        data.check(tokens, 256, 8)
    with pytest.raises(ConfigError, match=r"Set model.overrides.vocab_size=256"):
        data.check(tokens, 100, 4)


# ---- sampler


def sampler(num_tokens=64, data_rank=0, data_size=1, batch_size=4, seed=1, **rest):
    tokens = data.Tokens(np.arange(num_tokens, dtype=np.uint16), "here", None)
    return Sampler(tokens, 4, batch_size, seed, data_rank, data_size, **rest)


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    one = sampler()  # 16 windows, 4 a batch
    epochs = [torch.cat([one.batch(position)["input_ids"][:, 0] for position in range(e, e + 16, 4)]) for e in (0, 16)]
    for firsts in epochs:
        assert sorted(firsts.tolist()) == list(range(0, 64, 4))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_windows_are_runs_of_the_text_and_labels_equal_ids():
    batch = sampler().batch(4)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert torch.equal(batch["input_ids"] - batch["input_ids"][:, :1], torch.arange(4).expand(4, 4))


@pytest.mark.parametrize("data_size", [2, 4])
def test_ranks_together_see_the_batch_that_one_rank_would(data_size):
    for position in (0, 4, 12, 16):
        parts = [sampler(data_rank=rank, data_size=data_size).batch(position)["input_ids"] for rank in range(data_size)]
        assert torch.equal(torch.cat(parts), sampler().batch(position)["input_ids"])


def test_the_position_in_a_checkpoint_gives_the_same_next_batch():
    state = json.loads(json.dumps(sampler().state(12)))
    again = sampler(data_size=2)
    assert torch.equal(again.batch(again.resume(state))["input_ids"], sampler().batch(12)["input_ids"][:2])


@pytest.mark.parametrize("change", [dict(num_tokens=60), dict(seed=2)])
def test_a_position_in_other_data_is_refused(change):
    with pytest.raises(ValueError, match=r"would mean another text.*resume=never"):
        sampler(**change).resume(sampler().state(12))


def test_an_id_beyond_the_vocabulary_is_refused_by_name():
    with pytest.raises(ValueError, match="holds token 63, but the model has ids 0 to 59"):
        sampler(vocab_size=60, batch_size=16).batch(0)
