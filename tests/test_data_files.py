"""Which files are data: the formats of the table, by suffix and by content, and its document."""

from __future__ import annotations

import builtins
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ms_quant.data.calibration import load_stream, load_tokens
from ms_quant.data.files import FORMATS, Kind, count_chars, find_kind
from ms_quant.data.parquet import MAX_GROUP_BYTES
from ms_quant.data.records import KINDS, RECORD_KEYS, parse_record
from ms_quant.errors import MsQuantError

DOCUMENT = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(directory / "tokenizer.json"))
    return directory


def put(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.what)
def test_every_suffix_of_the_table_in_any_case(tmp_path: Path, row: Any) -> None:
    for suffix in row.suffixes or ("", ".txt", ".md", ".bak"):
        for name in (f"x{suffix}", f"X{suffix.upper()}", f"x.txt{suffix}"):
            path = put(tmp_path, name, b"hello")
            if row.kind is not None:
                assert find_kind(path) is row.kind
                continue
            message = rf"is {row.what}, expected text.*: {re.escape(row.advice)}$"
            with pytest.raises(MsQuantError, match=message):
                find_kind(path)


@pytest.mark.parametrize("row", [row for row in FORMATS if row.magic], ids=lambda row: row.what)
@pytest.mark.parametrize("name", ["x", "x.txt", "x.jsonl", "x.json"])
def test_the_content_counts_where_the_suffix_lies(tmp_path: Path, row: Any, name: str) -> None:
    for magic in row.magic:
        path = put(tmp_path, name, magic + b"\x00\x01\x02" * 20)
        if row.kind is None:
            with pytest.raises(MsQuantError, match=f"is {row.what}"):
                find_kind(path)
        else:
            assert find_kind(path) is row.kind


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "a".encode("utf-16"), "is UTF-16, expected UTF-8: iconv"),
        ("x.jsonl", "a".encode("utf-32"), "is UTF-32, expected UTF-8"),
        ("x.txt", "量化模型".encode("gbk"), r"is not UTF-8 at byte 0 \(0xc1\), expected text"),
        ("x.txt", b"caf\xe9 au lait", r"is not UTF-8 at byte 3 \(0xe9\)"),
        ("x.txt", "量".encode()[:2], r"is not UTF-8 at byte 0"),
        ("x.json", b'{"text": "caf\xe9"}', "is not UTF-8 at byte 13"),
        ("x.txt", b"\x80\x81\x82", "is not UTF-8 at byte 0"),
        ("x.txt", b"a\x00b", "holds NUL characters, is binary"),
        ("x.txt", "abc".encode("utf-16-le"), "holds NUL characters, is binary"),
        ("x.txt", b" \n\t\r\n", "holds nothing but white space"),
        ("x.jsonl", b"\xef\xbb\xbf\n", "holds nothing but white space"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("x.npz", b"w1 w2", r"not a readable \.npz file"),
        ("x.parquet", b"w1 w2", "not a readable Parquet file"),
    ],
)
def test_what_is_no_text(
    tmp_path: Path, model: Path, name: str, content: bytes, message: str
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet")
    with pytest.raises(MsQuantError, match=rf"{name}: {message}"):
        load_stream(put(tmp_path, name, content), model)


def test_bad_bytes_are_found_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for read in (1, 2, 3, 5):
        monkeypatch.setattr("ms_quant.data.files.READ_CHARS", read)
        with pytest.raises(MsQuantError, match="at byte 7 "):
            count_chars(put(tmp_path, "x", "量a量".encode() + b"\xff\xff"))
        with pytest.raises(MsQuantError, match="at byte 4 "):
            count_chars(put(tmp_path, "x", "量a量".encode()[:-1]))
        assert count_chars(put(tmp_path, "x", "\ufeff量a量".encode())) == 3


def test_paths_that_are_no_file(tmp_path: Path, model: Path) -> None:
    with pytest.raises(MsQuantError, match="is a directory, expected a file"):
        load_stream(tmp_path, model)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MsQuantError, match="is no regular file"):
        load_stream(tmp_path / "pipe", model)
    with pytest.raises(MsQuantError, match=r"wikitext: no such file.* by its name"):
        load_stream(tmp_path / "wikitext", model)


@pytest.mark.parametrize("name", ["x", "x.txt", "X.JSONL", "x.ndjson", "x.json", "x.jsonl.bak"])
@pytest.mark.parametrize("form", ["lines", "list", "strings"])
def test_records_are_found_under_any_name(
    tmp_path: Path, model: Path, name: str, form: str
) -> None:
    records: list[Any] = [{"text": "w1 w2"}, {"text": "w3\n w4"}]
    if form == "strings":
        records = [record["text"] for record in records]
    text = json.dumps(records, indent=1)
    if form == "lines":
        text = "\r\n\r\n".join(map(json.dumps, records))
    path = put(tmp_path, name, b"\xef\xbb\xbf" + text.encode())
    assert load_stream(path, model).tolist() == [1, 2, 3, 4]


def test_a_zip_of_arrays_needs_its_suffix(tmp_path: Path, model: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("tokens.npy", b"")
    with pytest.raises(MsQuantError, match="is a zip archive"):
        load_stream(tmp_path / "x", model)


def parquet(tmp_path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    pyarrow.write_table(arrow.table(columns), tmp_path / "x.parquet", **options)
    return tmp_path / "x.parquet"


@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["w1 w2", None, "w3 w4"], "url": ["a", "b", "c"]},
        {"question": ["w1", "w3"], "answer": ["w2", "w4"], "id": [1, 2]},
        {"input_ids": [[1, 2], [3, 4]]},
        {"input_ids": [[1, 2, 0], [3, 4, 0]], "attention_mask": [[1, 1, 0]] * 2},
    ],
)
def test_parquet(tmp_path: Path, model: Path, columns: Any) -> None:
    path = parquet(tmp_path, columns, row_group_size=2)
    assert load_stream(path, model).tolist() == [1, 2, 3, 4]
    assert load_stream(path.rename(tmp_path / "y.bak"), model).tolist() == [1, 2, 3, 4]


def test_conversations_in_parquet(tmp_path: Path, model: Path) -> None:
    """Keys that one message lacks are null there."""
    messages = [[{"role": "user", "content": "w1"}, {"role": "x", "content": "w2", "name": "n"}]]
    path = parquet(tmp_path, {"messages": messages, "prompt": ["w9"]})
    template = "{% for m in messages %} {{ m.content }} {{ m.name is defined }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    assert load_stream(path, model).tolist() == [1, 0, 2, 0]
    (model / "chat_template.jinja").unlink()


def test_large_parquet_is_drawn_from(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ms_quant.data.windows.WHOLE_CHARS", 100)
    rows = [f"w{i // 64} w{i // 8 % 8} w{i % 8} w9 w9" for i in range(512)]
    windows = load_tokens(parquet(tmp_path, {"text": rows}), model, 8, 5, seed=0)
    first = windows[:, :3].astype(int) @ [64, 8, 1]
    assert windows.shape == (8, 5) and (np.diff(first) > 8).all()


def test_refusals_of_parquet(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MsQuantError, match=r"has the columns \['a'\], expected one of text"):
        load_stream(parquet(tmp_path, {"a": ["x"]}), model)
    with pytest.raises(MsQuantError, match="row 2: text is a JSON number"):
        parse_record({"text": 3}, "row 2")
    path = parquet(tmp_path, {"text": ["w1"]})
    monkeypatch.setattr("ms_quant.data.parquet.MAX_GROUP_BYTES", 3)
    with pytest.raises(MsQuantError, match=r"row group 0 has .* expected at most 3: write it with"):
        load_stream(path, model)
    monkeypatch.setattr("ms_quant.data.parquet.MAX_GROUP_BYTES", MAX_GROUP_BYTES)
    raw = path.read_bytes()
    for content in (raw[:40], raw[:-8] + b"\xff\xff\xff\x7fPAR1", b"PAR1" + b"\x00" * 60):
        path.write_bytes(content)
        with pytest.raises(MsQuantError, match="not a readable Parquet file"):
            load_stream(path, model)


def test_parquet_without_its_library(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError("No module named 'pyarrow'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MsQuantError, match=r"pip install 'ms-quant\[parquet\]'.*JSON lines"):
        load_stream(put(tmp_path, "x.parquet", b"PAR1"), model)


def test_the_document_has_the_table_of_formats() -> None:
    rows = []
    for row in FORMATS:
        suffixes = ", ".join(f"`{suffix}`" for suffix in row.suffixes) or "any other"
        how = f"read: {row.advice}" if row.kind else f"refused: {row.advice}"
        rows.append(f"| {suffixes} | {row.what} | {how} |")
    assert "\n".join(rows) in DOCUMENT
    assert {row.kind for row in FORMATS} == {*Kind, None}


def test_the_document_has_the_table_of_records() -> None:
    rows = [f"| {', '.join(f'`{key}`' for key in kind.keys)} | {kind.becomes} |" for kind in KINDS]
    assert "\n".join(rows) in DOCUMENT
    assert len(set(RECORD_KEYS)) == len(RECORD_KEYS)
