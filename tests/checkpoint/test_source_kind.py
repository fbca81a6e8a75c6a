"""What a path given as a model is: each kind is one sentence that names it and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files.hub_cache import refuse_cached_place
from ms_quant.formats.source_kind import KINDS, find_model, model_directory

PAGE = Path(__file__).parents[2] / "docs" / "sources.md"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n"
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-0.6B"})
COMMITS = ("a" * 40, "b" * 40)


def fill(directory: Path, *names: str, **contents: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*names, *contents):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents.get(name, ""))
    return directory


# Names in the directory, and what the sentence must say.
KIND_CASES: dict[str, list[tuple[list[str], str]]] = {
    "an empty directory": [([], "is empty")],
    "an unfinished job or output of a command": [
        (["job.json", "block-00000.safetensors"], "same command finishes it"),
    ],
    "a LoRA adapter": [
        (
            ["adapter_config.json", "adapter_model.safetensors", "README.md"],
            r"adapter \(LoRA\) of 'Qwen/Qwen3-0.6B'",
        ),
        (["adapter_model.bin"], r"is an adapter \(LoRA\) and no whole model.*merge_and_unload"),
        (["config.json", "adapter_model.safetensors"], "is an adapter"),
    ],
    "GGUF": [
        (["model-q4_k_m.gguf"], r"GGUF files \(model-q4_k_m.gguf\)"),
        (["config.json", "Model-Q8.GGUF", "Model-F16.GGUF"], r"Model-F16.GGUF and 1 more"),
    ],
    "a diffusers pipeline": [(["model_index.json", "unet/config.json"], "pipeline of diffusers")],
    "Meta's original layout": [
        (["params.json", "consolidated.00.pth", "tokenizer.model"], "params.json beside consol"),
        (["params.json", "consolidated.safetensors", "tekken.json"], "layout of Meta or Mistral"),
    ],
    "a checkpoint of DeepSpeed": [
        (["zero_to_fp32.py", "latest", "config.json"], "zero_to_fp32.py . OUTPUT"),
        (["global_step10/mp_rank_00_model_states.pt"], "training checkpoint of DeepSpeed"),
    ],
    "a sharded checkpoint of FSDP": [
        (["__0_0.distcp", ".metadata"], "accelerate merge-weights"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "sharded training checkpoint"),
    ],
    "a checkpoint of Megatron": [
        (["latest_checkpointed_iteration.txt", "iter_0000010/x.pt"], "of Megatron"),
        (["mp_rank_00/model_optim_rng.pt"], "of Megatron"),
    ],
    "a trainer's directory": [
        (
            ["checkpoint-1000/config.json", "checkpoint-500/config.json", "trainer_state.json"],
            "expected one of its checkpoints: checkpoint-500, checkpoint-1000$",
        ),
    ],
    "PyTorch pickle files": [
        (["config.json", "pytorch_model.bin", "tokenizer.json"], r"pickle files \(pytorch_model"),
        (["config.json", "model.pt"], "save_pretrained.safe_serialization=True"),
        (["weights.PTH"], "can run code"),
    ],
    "MindSpore checkpoints": [(["qwen.ckpt", "config.json"], r"checkpoints of MindSpore")],
    "ONNX": [(["model.onnx"], "in ONNX"), (["config.json", "onnx/model.onnx"], "in ONNX")],
    "TensorFlow, Flax, OpenVINO or MLX files": [
        (["config.json", "tf_model.h5"], r"another framework \(tf_model.h5\)"),
        (["flax_model.msgpack"], "another framework"),
        (["weights.00.npz", "config.json"], "another framework"),
    ],
    "an unfinished download": [
        (["config.json", "model.safetensors.incomplete"], "hf download .* goes on with it"),
        (
            ["config.json", ".cache/huggingface/download/abc.incomplete"],
            r"unfinished download \(.cache/huggingface/download/abc.incomplete\)",
        ),
        (["config.json", "._____temp/model.safetensors"], "unfinished download"),
    ],
    "a data set": [(["train.parquet", "README.md"], "is a data set.*--calib")],
    "a cache or a directory of several models": [
        (
            ["Qwen3/config.json", "Llama/config.json", "notes.txt"],
            "expected one of those in it: .*/Llama, .*/Qwen3$",
        ),
        (["models/Qwen/Qwen3-0___6B/config.json"], "expected one of those in it: .*Qwen3-0___6B"),
    ],
    "a configuration without weights": [
        (["config.json", "tokenizer.json"], r"has a config.json and found no .safetensors file"),
    ],
    "any other directory": [
        (["notes.txt", "a/b.txt"], "neither config.json nor weights but notes.txt, a, expected"),
    ],
}


@pytest.mark.parametrize(
    ("title", "names", "message"),
    [(title, *case) for title, cases in KIND_CASES.items() for case in cases],
)
def test_each_kind_is_one_sentence(
    title: str, names: list[str], message: str, tmp_path: Path
) -> None:
    directory = fill(tmp_path / "given", *names)
    if "adapter_config.json" in names:
        (directory / "adapter_config.json").write_text(ADAPTER)
    with pytest.raises(MsQuantError, match=message) as found:
        find_model(directory)
    assert str(found.value).startswith(f"{directory}: ") and "\n" not in str(found.value)


def test_every_kind_is_tried_and_in_the_documents() -> None:
    titles = [kind.title for kind in KINDS]
    assert titles == list(KIND_CASES)
    rows = re.findall(r"^\| ([^|]+?) \|", PAGE.read_text(), re.MULTILINE)
    assert [row for row in rows if row in titles] == titles


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "is a file, expected a model directory: {parent}$"),
        ("config.json", "is a file, expected a model directory: {parent}$"),
        ("model.gguf", "is a GGUF file"),
        ("pytorch_model.bin", "is a pickle file"),
        ("model.tar.gz", "is an archive.*unpack it"),
    ],
)
def test_a_file_in_place_of_a_directory(name: str, message: str, tmp_path: Path) -> None:
    fill(tmp_path, "config.json", name)
    with pytest.raises(MsQuantError, match=message.format(parent=tmp_path)):
        find_model(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "merges.txt"]
)
def test_git_lfs_pointers(name: str, tmp_path: Path) -> None:
    fill(tmp_path, "config.json", "model.safetensors")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(MsQuantError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        find_model(tmp_path)
    (tmp_path / "model-2.safetensors").write_text(POINTER)
    with pytest.raises(MsQuantError, match="and 1 more are a Git LFS pointer"):
        find_model(tmp_path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\n<html>", "is a web page"),
        (b"GGUF\3\0\0\0", "is a GGUF file under another name"),
        (b"PK\3\4", "is a pickle file of PyTorch under another name"),
        (b"\x80\x02\x8a\nl", "is a pickle file of PyTorch under another name"),
    ],
)
def test_files_that_are_something_else(head: bytes, message: str, tmp_path: Path) -> None:
    fill(tmp_path, "config.json")
    (tmp_path / "model.safetensors").write_bytes(head)
    with pytest.raises(MsQuantError, match=message):
        find_model(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-00001-of-00003.safetensors"], "has 1 of 3 .* expected model-00002-of-00003.safet"),
        (
            ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            "has 2 of 3 weight files, expected model-00001-of-00003.safetensors, too",
        ),
        (["pytorch_model-00001-of-00002.safetensors"], "expected pytorch_model-00002-of-00002"),
    ],
)
def test_some_of_several_numbered_files(names: list[str], message: str, tmp_path: Path) -> None:
    fill(tmp_path, "config.json", *names)
    with pytest.raises(MsQuantError, match=message):
        find_model(tmp_path)
    fill(tmp_path, "model.safetensors.index.json")
    find_model(tmp_path)  # the reader of the index says which


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    directory = fill(tmp_path / "model", "config.json")
    (directory / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(MsQuantError, match=r"model.safetensors is a link to a file that is not th"):
        find_model(directory)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(MsQuantError, match=r"it is a link to .*gone, which is not there"):
        find_model(tmp_path / "link")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("huggingface.co/Qwen/Qwen3-0.6B/tree/main", "Qwen/Qwen3-0.6B"),
        ("https://hf-mirror.com/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("https://www.modelscope.cn/models/Qwen/Qwen3-0.6B/summary", "Qwen/Qwen3-0.6B"),
        ("hf://meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
    ],
)
def test_a_name_on_a_hub(
    given: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    folder = name.partition("/")[2]
    with pytest.raises(MsQuantError, match=f"hf download {name} --local-dir {folder}, then"):
        find_model(Path(given))
    cached = cache(tmp_path / "hub", COMMITS[0], name=name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(MsQuantError, match=f"{name} is in the cache of this machine: {cached}/sna"):
        find_model(Path(given))


def test_near_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "Qwen3-8B", "config.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MsQuantError, match=r"no such model directory, expected something like Qwen3"
    ):
        find_model(Path("Qwen3-8b"))
    with pytest.raises(MsQuantError, match=r"^/none/at/all: no such model directory$"):
        find_model(Path("/none/at/all"))


def cache(home: Path, *commits: str, name: str = "Qwen/Qwen3-0.6B", main: str = "") -> Path:
    """A repository in a cache, its files links into blobs as huggingface_hub makes them."""
    root = home / f"models--{name.replace('/', '--')}"
    fill(root / "blobs", "0" * 40)
    for commit in commits:
        snapshot = fill(root / "snapshots" / commit)
        for file in ("config.json", "model.safetensors"):
            (snapshot / file).symlink_to(f"../../blobs/{'0' * 40}")
    if main:
        fill(root / "refs", main=main)
    return root


def test_a_cached_repository_stands_for_its_snapshot(tmp_path: Path) -> None:
    root = cache(tmp_path, COMMITS[0])
    for given in (root, root / "snapshots"):
        found = find_model(given)
        assert found.directory == root / "snapshots" / COMMITS[0]
        assert f"its snapshot {COMMITS[0]} is read" in found.notes[0]
    assert find_model(root / "snapshots" / COMMITS[0]).notes == []


@pytest.mark.parametrize("main", [COMMITS[1], f"{COMMITS[1]}\n"])
def test_the_main_branch_chooses_among_snapshots(main: str, tmp_path: Path) -> None:
    root = cache(tmp_path, *COMMITS, main=main)
    assert model_directory(root) == root / "snapshots" / COMMITS[1]


@pytest.mark.parametrize("main", ["", "c" * 40, "../../../elsewhere", "x" * 5000])
def test_several_snapshots_are_listed(main: str, tmp_path: Path) -> None:
    root = cache(tmp_path, *COMMITS, main=main)
    with pytest.raises(MsQuantError, match=f"2 snapshots.*: {COMMITS[0]}, {COMMITS[1]}"):
        find_model(root)


def test_parts_of_a_cache(tmp_path: Path) -> None:
    root = cache(tmp_path / "hub", COMMITS[0], main=COMMITS[0])
    with pytest.raises(MsQuantError, match=f"its snapshot {root}/snapshots/{COMMITS[0]}"):
        find_model(root / "blobs")
    with pytest.raises(MsQuantError, match=f"is a blob of a hub's cache, expected .* {root}"):
        find_model(root / "blobs" / ("0" * 40))
    for place in (tmp_path / "hub", tmp_path):
        with pytest.raises(MsQuantError, match=f"expected one of those in it: {root}"):
            find_model(place)
    with pytest.raises(MsQuantError, match=r"without a snapshot.* hf download Qwen/Empty"):
        find_model(cache(tmp_path / "hub", name="Qwen/Empty"))


def test_a_cached_download_that_is_not_whole(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, COMMITS[0]) / "snapshots" / COMMITS[0]
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(MsQuantError, match=r"; hf download Qwen/Qwen3-0.6B gets what is missing"):
        find_model(snapshot)
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    with pytest.raises(MsQuantError, match=r"is a link to .*hf download Qwen/Qwen3-0.6B gets"):
        find_model(snapshot)


def test_nothing_is_written_into_a_cache(tmp_path: Path) -> None:
    root = cache(tmp_path, COMMITS[0])
    (tmp_path / "link").symlink_to(root)
    for place in (root / "q", root / "snapshots" / "q", tmp_path / "link" / "q", root):
        with pytest.raises(MsQuantError, match="a hub's cache, expected a directory apart from"):
            refuse_cached_place(place)
    refuse_cached_place(tmp_path / "out")
    refuse_cached_place(tmp_path / "models--not--a-cache" / "out")


def test_an_adapter_beside_a_whole_model_is_a_note(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from ms_quant.files.reader import Checkpoint

    directory = tiny_model(shards=1)
    names = Checkpoint(directory).names
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    fill(directory, "adapter_config.json", "adapter_model.safetensors", "consolidated.safetensors")
    (directory / "adapter_config.json").write_text(ADAPTER)
    (note,) = find_model(directory).notes
    assert "adapter (LoRA) of 'Qwen/Qwen3-0.6B' beside a whole model and is not read" in note
    assert Checkpoint(directory).names == names


def test_checkpoints_of_ours_pass(tmp_path: Path) -> None:
    ranks = fill(tmp_path / "ranks", "config.json", "rank_0/model.safetensors", "ms_quant.json")
    described = fill(tmp_path / "slim", "quant_model_description.json")
    assert model_directory(ranks) == ranks and model_directory(described) == described
