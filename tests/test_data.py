"""Calibration data: windows of every kind of file, chat templates, and one test for each defect."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ms_quant.data import files as data_files
from ms_quant.data import json_records as data_json
from ms_quant.data import token_ids
from ms_quant.data import windows as data_windows
from ms_quant.data.calibration import (
    eval_windows,
    few_tokens,
    load_stream,
    load_tokenizer,
    load_tokens,
    reading_bytes,
)
from ms_quant.data.tokenizer import ModelTokenizer
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
    for size in range(5, 24):  # a longer word than a chunk may be cut
        monkeypatch.setattr(data_windows, "CHUNK_CHARS", size)
        for read in (1, 3, 1000):
            monkeypatch.setattr(data_files, "READ_CHARS", read)
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
    with pytest.raises(MsQuantError, match=r"token id 5 \(w5\), expected ids from 0 to 2"):
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
    with pytest.raises(MsQuantError, match="found object of shape"):
        load_stream(tmp_path / "x.npz", model)
    put(tmp_path, "x.npz", pickle.dumps([1, 2]))
    with pytest.raises(MsQuantError, match=r"not a readable \.npz file"):
        load_stream(tmp_path / "x.npz", model)


def test_npz_that_unpacks_to_too_much(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "x.npz", tokens=np.zeros(100_000, np.int32))
    monkeypatch.setattr(token_ids, "MAX_FILE_BYTES", 10_000)
    with pytest.raises(MsQuantError, match=r"bytes unpacked from \d+, expected at most 10000"):
        load_stream(tmp_path / "x.npz", model)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.npz"])
def test_missing_and_empty_files(tmp_path: Path, model: Path, name: str) -> None:
    with pytest.raises(MsQuantError, match="no such file"):
        load_stream(tmp_path / name, model)
    with pytest.raises(MsQuantError, match="0 bytes, expected between 1 and"):
        load_stream(put(tmp_path, name, ""), model)


def test_file_too_large(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "MAX_FILE_BYTES", 3)
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


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"text": 3}', '{"text": "\\ud800"}'])
def test_a_wrong_record_is_named(tmp_path: Path, model: Path, line: str) -> None:
    path = put(tmp_path, "x.jsonl", '{"text": "w1"}\n' + line + "\n")
    with pytest.raises(MsQuantError, match=r"x\.jsonl: line 2"):
        load_stream(path, model)


def test_line_too_long(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_json, "MAX_RECORD_CHARS", 20)
    with pytest.raises(MsQuantError, match="line 1 is longer than 20 characters"):
        load_stream(lines(tmp_path, {"text": "w1 w2 w3 w4"}), model)


def test_no_end_token_to_put_between_records(tmp_path: Path, model: Path) -> None:
    path = lines(tmp_path, {"text": "w1"}, {"text": "w2"})
    configure(model, eos_token=None)
    assert load_stream(path, model).tolist() == [1, 2]
    put(model, "config.json", '{"eos_token_id": [7, 8]}')
    assert load_stream(path, model).tolist() == [1, 7, 2]


def test_no_chat_template(tmp_path: Path, model: Path) -> None:
    configure(model, chat_template=None)
    with pytest.raises(MsQuantError, match=r"line 1 is a conversation, .*has no chat template"):
        load_stream(lines(tmp_path, {"messages": [{"role": "user", "content": "w1"}]}), model)


def test_a_template_that_refuses_names_the_record(tmp_path: Path, model: Path) -> None:
    configure(model, chat_template="{{ raise_exception('no system role') }}")
    path = lines(tmp_path, {"text": "w1"}, {"messages": [{"role": "system", "content": "w1"}]})
    with pytest.raises(MsQuantError, match=r"line 2: .*the chat template failed \(no system role"):
        load_stream(path, model)


def test_ids_of_records_are_taken_as_they_are(tmp_path: Path, bos_model: Path) -> None:
    """No token is put before or between them; what the mask leaves out is padding."""
    path = lines(
        tmp_path,
        {"input_ids": [1, 2, 3, 0], "attention_mask": [1, 1, 1, 0]},
        {"input_ids": [4, 5, 6]},
    )
    assert eval_windows(path, bos_model, 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    (bos_model / "tokenizer.json").unlink()  # needless for ids
    put(bos_model, "config.json", '{"vocab_size": 6}')
    with pytest.raises(MsQuantError, match=r"token id 6, expected ids from 0 to 5"):
        eval_windows(path, bos_model, 3)
    with pytest.raises(MsQuantError, match="line 2: only some records are token ids"):
        load_stream(lines(tmp_path, {"input_ids": [1]}, {"text": "w1"}), bos_model)


def test_empty_records_leave_no_trace(tmp_path: Path, model: Path) -> None:
    path = lines(tmp_path, {"text": ""}, {"text": "w1"}, {"text": None}, " ", {"text": "w2"})
    assert load_stream(path, model).tolist() == [1, EOS, 2]
    with pytest.raises(MsQuantError, match="has only empty records"):
        load_stream(lines(tmp_path, {"text": ""}, {"messages": []}), model)


def test_ids_of_npy(tmp_path: Path, model: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(10).reshape(2, 5))
    assert eval_windows(tmp_path / "x.npy", model, 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object))
    with pytest.raises(MsQuantError, match="found object of shape"):
        load_stream(tmp_path / "x.npy", model)


@pytest.mark.parametrize(
    "text",
    ["w1 " * 300, "w1 " * 299 + "w2", "w1 w2\n" * 200, "w3 w1 w2 " + "w1 " * 400],
)
def test_a_token_again_and_again_is_no_data(tmp_path: Path, model: Path, text: str) -> None:
    with pytest.raises(MsQuantError, match=r"x\.txt: \d+% of its tokens are the id 1, expected"):
        load_tokens(put(tmp_path, "x.txt", text), model, 4, 64, seed=0)


def test_few_tokens_are_mentioned(tmp_path: Path, model: Path) -> None:
    poor = load_tokens(put(tmp_path, "x.txt", "w1 w2 w3 w4\n" * 80), model, 4, 64, seed=0)
    assert str(few_tokens(poor)).startswith("only 4 different token ids occur")
    rich = load_tokens(put(tmp_path, "x.txt", " ".join(WORDS[:20]) * 20), model, 4, 64, seed=0)
    assert few_tokens(rich) is None
    assert few_tokens(rich[:1, :8]) is None  # too few to judge


def test_only_as_much_as_is_evaluated(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_windows, "CHUNK_CHARS", 40)
    path = put(tmp_path, "x.txt", "w1 w2 w3 w4 w5\n" * 1000)
    seen = count_encoded(monkeypatch)
    whole = eval_windows(path, model, 8)
    assert sum(seen) == 5000
    seen.clear()
    assert eval_windows(path, model, 8, 3).tolist() == whole[:3].tolist()
    assert sum(seen) < 60


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what is tokenized from now on."""
    seen: list[int] = []
    encode = ModelTokenizer.encode

    def counted(self: ModelTokenizer, text: str) -> np.ndarray:
        ids = encode(self, text)
        seen.append(len(ids))
        return ids

    monkeypatch.setattr(ModelTokenizer, "encode", counted)
    return seen


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some kilobytes are large ones."""
    monkeypatch.setattr(data_windows, "WHOLE_CHARS", 100)
    monkeypatch.setattr(data_windows, "LEAST_CHARS", 64)
    monkeypatch.setattr(data_windows, "CHUNK_CHARS", 500)


def numbered(count: int) -> list[str]:
    """Lines of ten words, of which the first three say which line it is."""
    return [
        f"w{i // 100 % 10} w{i // 10 % 10} w{i % 10} " + "w15 " * 6 + "w11" for i in range(count)
    ]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["text", "lines", "list", "ids"])
def test_windows_of_a_large_file_come_from_all_of_it(
    tmp_path: Path, bos_model: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows = numbered(900)
    tokenizer = load_tokenizer(bos_model)
    content = {
        "text": "\n".join(rows),
        "lines": "\n".join(json.dumps({"text": row}) for row in rows),
        "list": json.dumps([{"text": row} for row in rows]),
        "ids": json.dumps([tokenizer.encode(row).tolist() for row in rows]),
    }[kind]
    path = put(tmp_path, "x.txt" if kind == "text" else "x.json", content)
    seen = count_encoded(monkeypatch)
    windows = load_tokens(path, bos_model, 8, 21, seed=0)
    assert windows.shape == (8, 21)
    assert sum(seen) < 8 * 21 * 4  # of 9,000 tokens
    body = windows if kind == "ids" else windows[:, 1:]
    assert kind == "ids" or (windows[:, 0] == BOS).all()
    first = body[:, :3].astype(int) @ [100, 10, 1]  # each begins with a line, or a record
    assert (body[:, 3:9] == 15).all() and (np.diff(first) > 1).all()
    assert [number * 8 // 900 for number in first] == pytest.approx(list(range(8)), abs=1)
    between = {"lines": [EOS], "list": [EOS]}.get(kind, [])
    tail = np.concatenate([[11], between, body[0, :1]])  # and goes on in the next one
    assert body[0, 9 : 9 + len(tail) - 1].tolist() == tail[:-1].tolist()
    assert load_tokens(path, bos_model, 8, 21, seed=0).tolist() == windows.tolist()
    assert load_tokens(path, bos_model, 8, 21, seed=1).tolist() != windows.tolist()


@pytest.mark.usefixtures("small")
def test_windows_of_one_long_record(tmp_path: Path, model: Path) -> None:
    """A record that is the whole file is drawn from all over, as text is."""
    path = lines(tmp_path, {"text": "\n".join(numbered(900))})
    windows = load_tokens(path, model, 8, 20, seed=0)
    first = windows[:, :3].astype(int) @ [100, 10, 1]
    assert windows.shape == (8, 20)
    assert (np.diff(first) > 2).all() and first[-1] > 700


@pytest.mark.usefixtures("small")
def test_windows_do_not_overlap_where_tokens_are_rare(tmp_path: Path, model: Path) -> None:
    """The second half of the file has hardly a token."""
    path = put(tmp_path, "x.txt", "\n".join(numbered(300)) + "\nw1" + " " * 30_000 + "w2")
    windows = load_tokens(path, model, 8, 20, seed=0)
    first = windows[:, :3].astype(int) @ [100, 10, 1]
    assert windows.shape == (8, 20)
    assert (np.diff(first) >= 2).all()


@pytest.mark.usefixtures("small")
def test_a_file_with_fewer_tokens_than_its_size_promises(tmp_path: Path, model: Path) -> None:
    """All of it is tokenized where places give too few windows."""
    path = put(tmp_path, "x.txt", ("w1 w2 w3" + " " * 300 + "\nw4\n") * 40)
    windows = load_tokens(path, model, 8, 20, seed=0)
    assert windows.tolist() == eval_windows(path, model, 20).tolist()


@pytest.mark.usefixtures("small")
def test_the_end_of_a_large_file_is_checked_too(tmp_path: Path, model: Path) -> None:
    path = put(tmp_path, "x.jsonl", '{"text": "w1 w2 w3 w4"}\n' * 900 + '{"text": 3}')
    with pytest.raises(MsQuantError, match="line 901: text is a JSON number"):
        load_tokens(path, model, 2, 8, seed=0)
    path = put(tmp_path, "x.txt", b"w1 w2 w3 w4\n" * 900 + b"\xff")
    with pytest.raises(MsQuantError, match=r"is not UTF-8 at byte 10800 \(0xff\)"):
        load_tokens(path, model, 2, 8, seed=0)


def test_the_plan_says_what_reading_takes(tmp_path: Path, model: Path) -> None:
    path = put(tmp_path, "x.txt", "w1")
    size = (model / "tokenizer.json").stat().st_size
    assert reading_bytes(path, model) == (64 << 20) + 12 * size
    np.savez_compressed(tmp_path / "x.npz", np.zeros(1_000_000, np.int64))
    assert 16_000_000 < reading_bytes(tmp_path / "x.npz", model) < 16_001_000


def test_the_bundled_text_is_read_as_ever() -> None:
    """What the documents measure was made of these windows."""
    root = Path(__file__).parents[1] / "models"
    windows = load_tokens(root / "text/calibration.txt", root / "stdlib-qwen3-6m", 64, 256, 0)
    digest = hashlib.sha256(windows.tobytes()).hexdigest()
    assert digest.startswith("9ad1e1e197d58bcb")
