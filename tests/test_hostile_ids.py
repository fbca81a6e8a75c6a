"""Token ids from files that somebody has made to be hard to read."""

from __future__ import annotations

import io
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moments import bounded, mutate

from ms_quant.data.calibration import load_stream
from ms_quant.data.token_ids import read_ids
from ms_quant.errors import MsQuantError


def header(shape: Any, descr: str = "<i8", text: str = "") -> bytes:
    text = text or str({"descr": descr, "fortran_order": False, "shape": shape})
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


def archive(path: Path, content: bytes, packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as file:
        file.writestr("tokens.npy", content)
    return path


def refused(path: Path, match: str) -> None:
    """One sentence, soon, in little memory."""
    tracemalloc.start()
    try:
        with bounded(10), pytest.raises(MsQuantError, match=match) as error:
            read_ids(path)
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_small_file_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    path, zeros = tmp_path / "x.npz", bytes(1 << 20)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("tokens.npy", "w") as member,
    ):
        member.write(header((300 << 17,)))
        for _ in range(300):
            member.write(zeros)
    assert path.stat().st_size < 1 << 20
    refused(path, r"314\d+ bytes unpacked from \d+, expected at most")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (header((1 << 40,)), "states the shape"),
        (header((1 << 70,)), "states the shape"),
        (header((1 << 40, 0)), "no room|expected"),
        (header((-4,)), "states the shape"),
        (header((4,)) + bytes(31), "states the shape|cut off|mmap length"),
        (header((4,), "<f8") + bytes(32), "found float64"),
        (header((1,), "|O"), "found object"),
        (header((), "<i8") + bytes(8), "expected integers"),
        (header(0, text="{'descr': '<i8', "), "not a readable"),
        (header(0, text="(" * 200), "not a readable"),
        (header(0, text="[" * 9000), "not a readable"),
        (header(0, text="'''"), "not a readable"),
        (header(0, text="{'descr': [('a', '<i8')], 'fortran_order': 0, 'shape': 2}"), "."),
        (header(0, text="{'descr': '<i8', 'fortran_order': False, 'shape': ('a',)}"), "."),
        (header(0, text="{'descr': '<i8', 'fortran_order': False, 'shape': (True,)}"), "."),
        (b"\x93NUMPY\x09\x00" + bytes(8), "not a readable"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "not a readable"),
        (b"", "not a readable"),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes, match: str) -> None:
    if content == header((1 << 40, 0)):
        assert read_ids(archive(tmp_path / "x.npz", content)).shape == (1 << 40, 0)
        return
    refused(archive(tmp_path / "x.npz", content), match)
    (tmp_path / "x.npy").write_bytes(content)
    refused(tmp_path / "x.npy", match)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packing_is_named(tmp_path: Path, packing: int) -> None:
    refused(archive(tmp_path / "x.npz", header((4,)) + bytes(32), packing), "is packed in another")


def test_an_encrypted_member_and_a_wrong_checksum(tmp_path: Path) -> None:
    good = archive(tmp_path / "x.npz", header((4,)) + bytes(32), zipfile.ZIP_STORED).read_bytes()
    path = tmp_path / "x.npz"
    start, end = bytearray(good), bytearray(good)
    for at in (good.index(b"PK\x03\x04") + 6, good.index(b"PK\x01\x02") + 8):
        start[at] |= 1
    path.write_bytes(start)
    refused(path, "encrypted")
    end[good.index(b"NUMPY") + 90] ^= 1
    path.write_bytes(end)
    refused(path, "not a readable|states|found|CRC")


def test_random_damage(tmp_path: Path) -> None:
    """Read as they are, or refused in a sentence."""
    rng, seen = random.Random(5), {True: 0, False: 0}
    ids, file = np.arange(3000), io.BytesIO()
    np.savez_compressed(file, tokens=ids)
    plain = io.BytesIO()
    np.savez(plain, tokens=ids)
    path = tmp_path / "x.npz"
    for _ in range(300):
        path.unlink(missing_ok=True)
        path.write_bytes(rng.choice([file, plain]).getvalue())
        how = mutate(path, rng)
        if path.is_dir():
            path.rmdir()
            continue
        try:
            with bounded(10):
                found = (
                    load_stream(path, tmp_path)
                    if path.is_symlink() or path.is_fifo()
                    else read_ids(path)
                )
            assert how in ("a hole", "twice", "longer") or (found == ids).all()
            seen[True] += 1
        except MsQuantError as error:
            assert "\n" not in str(error)
            seen[False] += 1
    assert min(seen.values()) > 5


@pytest.mark.parametrize("begin", [b"", b"\n\n  ", b"text\n", b'{"text": "', b"[", b'["'])
def test_gigabytes_of_nul_are_named_within_seconds(
    tmp_path: Path, begin: bytes, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model()
    for name in ("x.txt", "x.jsonl", "x.json", "x.md", "x"):
        path = tmp_path / name
        path.write_bytes(begin)
        with path.open("r+b") as file:
            file.truncate((4 << 30) - 1)
        started = time.monotonic()
        with pytest.raises(MsQuantError, match="NUL characters"):
            load_stream(path, model)
        assert time.monotonic() - started < 5
