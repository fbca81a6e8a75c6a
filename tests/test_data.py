"""Calibration data: windows of every kind of file, chat templates, and one test for each defect."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ms_quant import data
from ms_quant.data import eval_windows, load_stream, load_tokenizer, load_tokens
from ms_quant.errors import MsQuantError

WORDS = [f"w{i}" for i in range(20)] + ["user:", "assistant:"]
EOS, BOS, SIZE = len(WORDS), len(WORDS) + 1, len(WORDS) + 2
TEMPLATE = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A word-level tokenizer that would truncate and pad, if it were let."""
    directory = tmp_path / "model"
    directory.mkdir()
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["</s>", "<s>"])
    words.enable_truncation(4)
    words.enable_padding(length=4, pad_id=EOS, pad_token="</s>")
    words.save(str(directory / "tokenizer.json"))
    configure(directory)
    return directory


def configure(directory: Path, **changes: Any) -> None:
    config = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | changes))


def put(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(tmp_path: Path, *records: Any) -> Path:
    return put(tmp_path, "x.jsonl", "".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def bos_model(model: Path) -> Path:
    """The same, with a begin token before every text."""
    path = model / "tokenizer.json"
    words = Tokenizer.from_file(str(path))
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    words.save(str(path))
    return model


def test_every_window_begins_as_a_served_text_does(tmp_path: Path, bos_model: Path) -> None:
    path = put(tmp_path, "x.txt", "w1 w2 w3\nw4 w5\r\nw6 w7")
    assert load_stream(path, bos_model).tolist() == [1, 2, 3, 4, 5, 6, 7]
    windows = eval_windows(path, bos_model, 4)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[BOS, 1, 2, 3], [BOS, 4, 5, 6]]
    assert load_tokens(path, bos_model, 1, 8, seed=0).tolist() == [[BOS, 1, 2, 3, 4, 5, 6, 7]]
    with pytest.raises(MsQuantError, match=r"^seq_len is 1, expected at least 2$"):
        eval_windows(path, bos_model, 1)
    np.savez(tmp_path / "x.npz", tokens=np.arange(4))
    assert eval_windows(tmp_path / "x.npz", bos_model, 2).tolist() == [[0, 1], [2, 3]]
    assert load_tokenizer(bos_model).encode_prompt("w5 w6").tolist() == [BOS, 5, 6]


def test_a_begin_token_that_the_template_writes_is_not_doubled(
    tmp_path: Path, bos_model: Path
) -> None:
    configure(bos_model, chat_template="{{ bos_token }} {{ messages[0].content }}")
    path = lines(tmp_path, {"messages": [{"role": "user", "content": "w1 w2"}]}, {"text": "w3"})
    assert load_stream(path, bos_model).tolist() == [1, 2, EOS, 3]
    assert eval_windows(path, bos_model, 5).tolist() == [[BOS, 1, 2, EOS, 3]]


def test_a_begin_token_that_is_not_added_stays_away(tmp_path: Path, model: Path) -> None:
    assert load_tokenizer(model).encode_prompt("w5").tolist() == [5]


def test_text_is_one_stream_without_special_tokens(tmp_path: Path, model: Path) -> None:
    path = put(tmp_path, "x.txt", "w1 w2 w3\nw4 w5\r\nw6 w7")
    ids = load_stream(path, model)
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert eval_windows(path, model, 3).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_byte_order_mark_is_no_token(tmp_path: Path, model: Path) -> None:
    assert load_stream(put(tmp_path, "x.md", b"\xef\xbb\xbfw1"), model).tolist() == [1]


def test_chunks_end_at_newlines(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, "x.txt", "w1 w2 w3\nw4 w15 w16\n\nw7")
    whole = load_stream(path, model)
    for size in range(11, 24):  # a longer line than a chunk may be cut
        monkeypatch.setattr(data, "CHUNK_CHARS", size)
        assert load_stream(path, model).tolist() == whole.tolist()


def test_samples_are_drawn_by_seed_in_file_order(tmp_path: Path, model: Path) -> None:
    path = put(tmp_path, "x.txt", " ".join(WORDS[:20]))
    drawn = load_tokens(path, model, 4, 2, seed=0)
    assert drawn.shape == (4, 2)
    assert drawn.dtype == np.int32
    assert (np.diff(drawn[:, 0]) > 0).all()
    assert (drawn[:, 0] % 2 == 0).all()  # windows do not overlap
    np.testing.assert_array_equal(drawn, load_tokens(path, model, 4, 2, seed=0))
    assert any((load_tokens(path, model, 4, 2, seed=s) != drawn).any() for s in range(1, 5))


def test_fewer_windows_than_samples(tmp_path: Path, model: Path) -> None:
    path = put(tmp_path, "x.txt", "w1 w2 w3 w4 w5")
    assert load_tokens(path, model, 128, 2, seed=0).tolist() == [[1, 2], [3, 4]]


def test_records_are_packed_with_eos_between(tmp_path: Path, model: Path) -> None:
    path = lines(
        tmp_path,
        {"text": "w1 w2", "id": 7},
        {"prompt": "w3", "answer": "w4"},
        {"prompt": "w5 ", "completion": "w6"},
        {"messages": [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9"}]},
    )
    expected = [1, 2, EOS, 3, 4, EOS, 5, 6, EOS, 20, 8, 21, 9]
    assert load_stream(path, model).tolist() == expected


def test_blank_lines_between_records(tmp_path: Path, model: Path) -> None:
    path = put(tmp_path, "x.jsonl", '{"text":"w1"}\n\n{"text":"w2"}')
    assert load_stream(path, model).tolist() == [1, EOS, 2]


def test_prompt_and_answer_do_not_run_together() -> None:
    assert data._join(["a?", "b"]) == "a?\nb"
    assert data._join(["a? ", "b"]) == "a? b"
    assert data._join(["a?", "\nb"]) == "a?\nb"
    assert data._join(["a"]) == "a"


@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_npz_of_one_dimension(tmp_path: Path, model: Path, dtype: Any) -> None:
    np.savez(tmp_path / "x.npz", tokens=np.arange(7, dtype=dtype), other=np.zeros(1))
    windows = eval_windows(tmp_path / "x.npz", model, 3)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_npz_of_two_dimensions_is_cut_row_by_row(tmp_path: Path, model: Path) -> None:
    np.savez(tmp_path / "x.npz", np.arange(10).reshape(2, 5))
    assert eval_windows(tmp_path / "x.npz", model, 2).tolist() == [[0, 1], [2, 3], [5, 6], [7, 8]]


def test_the_vocabulary_of_the_model_counts(tmp_path: Path, model: Path) -> None:
    np.savez(tmp_path / "x.npz", tokens=np.array([SIZE - 1, 99]))
    with pytest.raises(MsQuantError, match=f"token id 99, expected ids from 0 to {SIZE - 1}"):
        load_stream(tmp_path / "x.npz", model)
    put(model, "config.json", '{"vocab_size": 100}')
    assert load_stream(tmp_path / "x.npz", model).tolist() == [SIZE - 1, 99]
    put(model, "config.json", '{"vocab_size": 3}')
    with pytest.raises(MsQuantError, match="token id 5, expected ids from 0 to 2"):
        load_stream(put(tmp_path, "x.txt", "w1 w5"), model)


def test_negative_ids(tmp_path: Path, model: Path) -> None:
    np.savez(tmp_path / "x.npz", tokens=np.array([1, -2]))
    with pytest.raises(MsQuantError, match="token id -2"):
        load_stream(tmp_path / "x.npz", model)


def test_ids_too_large_for_int32(tmp_path: Path, model: Path) -> None:
    np.savez(tmp_path / "x.npz", tokens=np.array([1, 1 << 32]))
    with pytest.raises(MsQuantError, match=f"token id {1 << 32}"):
        load_stream(tmp_path / "x.npz", model)


@pytest.mark.parametrize(
    "arrays",
    [
        {"tokens": np.zeros(4, np.float32)},
        {"tokens": np.zeros((1, 2, 2), np.int32)},
        {"tokens": np.array(1)},
    ],
)
def test_npz_of_another_kind(tmp_path: Path, model: Path, arrays: Any) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(MsQuantError, match="expected integers of one or two dimensions"):
        load_stream(tmp_path / "x.npz", model)


def test_npz_with_several_arrays(tmp_path: Path, model: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(3), b=np.arange(3))
    with pytest.raises(MsQuantError, match=r"arrays \['a', 'b'\], expected one named tokens"):
        load_stream(tmp_path / "x.npz", model)


def test_npz_with_a_pickle_is_not_loaded(tmp_path: Path, model: Path) -> None:
    np.savez(tmp_path / "x.npz", tokens=np.array([{}], dtype=object))
    with pytest.raises(MsQuantError, match="allow_pickle=False"):
        load_stream(tmp_path / "x.npz", model)
    put(tmp_path, "x.npz", pickle.dumps([1, 2]))
    with pytest.raises(MsQuantError, match=r"not a readable \.npz file"):
        load_stream(tmp_path / "x.npz", model)


def test_npz_that_unpacks_to_too_much(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "x.npz", tokens=np.zeros(100_000, np.int32))
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 10_000)
    with pytest.raises(MsQuantError, match="bytes unpacked, expected at most 10000"):
        load_stream(tmp_path / "x.npz", model)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.npz"])
def test_missing_and_empty_files(tmp_path: Path, model: Path, name: str) -> None:
    with pytest.raises(MsQuantError, match="no such file"):
        load_stream(tmp_path / name, model)
    with pytest.raises(MsQuantError, match="0 bytes, expected between 1 and"):
        load_stream(put(tmp_path, name, ""), model)


def test_file_too_large(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 3)
    with pytest.raises(MsQuantError, match="4 bytes, expected between 1 and 3"):
        load_stream(put(tmp_path, "x.txt", "w1 w"), model)


def test_fewer_tokens_than_one_window(tmp_path: Path, model: Path) -> None:
    path = put(tmp_path, "x.txt", "w1 " * 12)
    with pytest.raises(MsQuantError, match=r"x\.txt: 12 tokens, expected at least 256 for a"):
        load_tokens(path, model, 8, 256, seed=0)
    np.savez(tmp_path / "x.npz", np.zeros((0, 300), np.int32))
    with pytest.raises(MsQuantError, match="0 tokens, expected at least 256"):
        load_tokens(tmp_path / "x.npz", model, 8, 256, seed=0)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 1), (1, 0)])
def test_samples_and_seq_len_are_positive(
    tmp_path: Path, model: Path, samples: int, seq_len: int
) -> None:
    with pytest.raises(MsQuantError, match=r"is 0, expected (a positive number|at least 1)$"):
        load_tokens(put(tmp_path, "x.txt", "w1"), model, samples, seq_len, seed=0)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_not_utf8(tmp_path: Path, model: Path, name: str) -> None:
    with pytest.raises(MsQuantError, match="not UTF-8"):
        load_stream(put(tmp_path, name, b"\x80\x04\x95"), model)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ('["a"]', "line 2 is a JSON list, expected an object"),
        ('{"question": "a"}', r"line 2 has the keys \['question'\], expected either text"),
        ('{"prompt": "a"}', "line 2 has the keys"),
        ('{"answer": "a"}', "line 2 has the keys"),
        ('{"text": "a", "messages": []}', "line 2 has the keys"),
        ('{"prompt": "a", "answer": "b", "response": "c"}', "line 2 has the keys"),
        ('{"text": 3}', "line 2: text, expected strings"),
        ('{"prompt": "a", "answer": null}', "line 2: prompt and answer, expected strings"),
        ('{"messages": []}', "line 2: messages, expected a list"),
        ('{"messages": "a"}', "line 2: messages, expected a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: messages, expected a list"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "line 2: messages, expected a list"),
        ('{"text": "\\ud800"}', "line 2 holds half of a surrogate pair"),
    ],
)
def test_malformed_record(tmp_path: Path, model: Path, line: str, message: str) -> None:
    path = put(tmp_path, "x.jsonl", '{"text": "w1"}\n' + line + "\n")
    with pytest.raises(MsQuantError, match=rf"x\.jsonl: {message}"):
        load_stream(path, model)


def test_line_too_long(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_RECORD_CHARS", 20)
    with pytest.raises(MsQuantError, match="line 1 is longer than 20 characters"):
        load_stream(lines(tmp_path, {"text": "w1 w2 w3 w4"}), model)


def test_no_eos_token_to_put_between_records(tmp_path: Path, model: Path) -> None:
    configure(model, eos_token=None)
    assert load_stream(lines(tmp_path, {"text": "w1"}), model).tolist() == [1]
    with pytest.raises(MsQuantError, match="names no known eos_token"):
        load_stream(lines(tmp_path, {"text": "w1"}, {"text": "w2"}), model)


def test_no_chat_template(tmp_path: Path, model: Path) -> None:
    configure(model, chat_template=None)
    with pytest.raises(MsQuantError, match="has no chat template"):
        load_stream(lines(tmp_path, {"messages": [{"role": "user", "content": "w1"}]}), model)
