"""Tries every recipe that a wheel of msModelSlim ships: what runs, and why the rest does not.

    pip download --no-deps msmodelslim==26.1.0
    python tools/check_modelslim_recipes.py msmodelslim-26.1.0-py3-none-any.whl

Each goes through the code of ``ms-quant quantize --recipe FILE --dry-run`` twice: on a model of the
family that it was written for, and on a dense decoder, which tells what is missing in the recipe
language from what is missing in the families. The models have the layers of the real ones, so that
every name of a linear is there, and are small otherwise: shapes alone decide a plan. Nothing is
copied from the wheel.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import struct
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.errors import MsQuantError
from ms_quant.models.config import parse_config
from ms_quant.pipeline.estimate import estimate
from ms_quant.pipeline.options import QuantizeOptions, read_recipe
from ms_quant.pipeline.request import prepare

PRACTICE, DATA = "msmodelslim/lab_practice/", "msmodelslim/lab_calib/"
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
DENSE = (  # of a recipe's path, what it is for: family and layers
    ("default/", "qwen3", 36),
    ("deepseek-r1-distill/", "qwen2", 28),
    ("qwen1_5/qwen1.5-110b", "qwen2", 80),
    ("qwen2/qwen2-72b", "qwen2", 80),
    ("qwen2/qwen2-7b", "qwen2", 28),
    ("qwen2_5/qwen2.5-32b", "qwen2", 64),
    ("qwen2_5/qwen2.5-7b", "qwen2", 28),
    ("qwen2_5/qwen2.5-sparse", "qwen2", 28),
    ("qwen2_5/qwen2.5-w8a8c8", "qwen2", 80),
    ("qwen3/qwen3-8b", "qwen3", 36),
    ("qwen3/qwen3-14b", "qwen3", 40),
    ("qwen3/qwen3-32b", "qwen3", 64),
    ("qwq/", "qwen2", 64),
)
OTHERS = {  # directory to the model_type that such a checkpoint says
    "deepseek_v3": "deepseek_v3",
    "deepseek_v3_2": "deepseek_v32",
    "deepseek_v4": "deepseek_v4",
    "glm4_6v": "glm4v_moe",
    "glm4_moe": "glm4_moe",
    "glm_5": "glm_moe_dsa",
    "internvl3_5": "internvl_chat",
    "internvl3_5_moe": "internvl_chat",
    "kimi_k2": "kimi_k2",
    "kimi_k2_5": "kimi_k25",
    "longcat_flash": "longcat_flash",
    "minimax_m2": "minimax_m2",
    "qwen2_5_omni_thinker": "qwen2_5_omni_thinker",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_omni_moe": "qwen3_omni_moe",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "step_3_5_flash": "step3p5",
}
PIPELINES = {  # directory to the class that model_index.json names
    "flux1": "FluxPipeline",
    "hunyuan_video": "HunyuanVideoPipeline",
    "qwen_image_edit": "QwenImageEditPipeline",
    "wan2_1": "WanPipeline",
    "wan2_2": "WanPipeline",
}
ANY_DENSE = ("qwen2", 64)


@dataclass(frozen=True)
class Tried:
    """What became of one recipe.

    Attributes:
        name: its path in the wheel.
        language: its ``apiversion``.
        refusal: why the recipe is not understood, or "".
        dense: why it does not plan on a dense decoder, or "".
        family: why it does not plan on its own family, or "".
        data: where the calibration data is that it names.
        notes: what is said of it on its own family.
    """

    name: str
    language: str
    refusal: str
    dense: str = ""
    family: str = ""
    data: str = ""
    notes: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        return self.refusal or self.family


class Models:
    """Checkpoints without weights: a header, and a hole for what it describes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def dense(self, family: str, layers: int) -> Path:
        directory = self.root / f"{family}-{layers}"
        if directory.exists():
            return directory
        directory.mkdir()
        raw = {**SMALL, "model_type": family, "num_hidden_layers": layers}
        (directory / "config.json").write_text(json.dumps(raw))
        header: dict[str, Any] = {}
        end = 0
        for name, shape in parse_config(raw).parameter_shapes().items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        return directory

    def named(self, file: str, content: dict[str, Any]) -> Path:
        """A directory with one JSON file that says what the model is."""
        directory = self.root / next(iter(content.values()))
        directory.mkdir(exist_ok=True)
        (directory / file).write_text(json.dumps({**content, **SMALL, "num_hidden_layers": 4}))
        return directory

    def of_recipe(self, name: str) -> Path:
        for start, family, layers in DENSE:
            if name.startswith(start):
                return self.dense(family, layers)
        folder = name.partition("/")[0]
        if folder in PIPELINES:
            return self.named("model_index.json", {"_class_name": PIPELINES[folder]})
        return self.named("config.json", {"model_type": OTHERS.get(folder, folder)})


def practice(source: Path, scratch: Path) -> Path:
    """The directory of recipes in a wheel, which is unpacked, or in an unpacked one."""
    if source.is_dir():
        found = source / PRACTICE
        return found if found.is_dir() else source
    with zipfile.ZipFile(source) as wheel:
        for name in wheel.namelist():
            recipe = name.startswith(PRACTICE) and name.endswith(".yaml")
            if recipe or re.fullmatch(DATA + r"[^/]+\.jsonl?", name):
                wheel.extract(name, scratch)
    return scratch / PRACTICE


def attempt(path: Path, name: str, models: Models, calib: Path, scratch: Path) -> Tried:
    language = re.search(r"^apiversion:\s*(\S+)", path.read_text("utf-8"), re.MULTILINE)
    said = language[1].strip("\"'") if language else "none"
    try:
        recipe = read_recipe(path)
    except MsQuantError as error:
        return Tried(name, said, str(error).removeprefix(f"{path}: "))
    data = "none named" if recipe.calib is None else "in lab_calib"
    if recipe.calib is not None and not Path(recipe.calib).is_file():
        data = "not in the wheel"
    ready = replace(recipe, calib=str(calib))

    def plan(model: Path) -> tuple[str, tuple[str, ...]]:
        options = QuantizeOptions(model, scratch / "out", recipe=ready, samples=None)
        try:
            checked = prepare(options)
            estimate(checked, options.output)
        except MsQuantError as error:
            return str(error).removeprefix(f"{model}").lstrip("/:. "), ()
        return "", checked.notes

    own, notes = plan(models.of_recipe(name))
    dense, _ = plan(models.dense(*ANY_DENSE))
    return Tried(name, said, "", dense, own, data, notes)


def kind_of(reason: str) -> str:
    """A refusal without what differs from recipe to recipe."""
    reason = re.sub(r"\[\d+\]", "", reason.partition(", expected")[0])
    reason = re.sub(r"\.configs(?=\.)", "", reason)
    if "matches no linear" in reason:
        return "patterns that match no linear of a dense decoder"
    return reason.partition(";")[0]


def report(found: list[Tried], verbose: bool) -> None:
    for one in found:
        state = "refused" if one.refusal else ("understood" if one.family else "runs")
        print(f"{one.name} | {one.language} | {state} | {one.reason or 'data: ' + one.data}")
        if verbose:
            print(
                *(f"    note: {note}" for note in one.notes), sep="\n", end="\n" * bool(one.notes)
            )
    understood = [one for one in found if not one.refusal]
    print(
        f"\n{len(found)} recipes: {len(understood)} are understood, "
        f"{sum(not one.dense for one in understood)} of them plan on a dense decoder, "
        f"{sum(not one.family for one in understood)} on the model that they are for."
    )
    for title, reasons in (
        ("not understood", [one.refusal for one in found if one.refusal]),
        ("understood, the model is not", [one.family for one in understood if one.family]),
        ("understood, not of a dense decoder", [one.dense for one in understood if one.dense]),
    ):
        print(f"\n{title}:")
        for kind, count in Counter(map(kind_of, reasons)).most_common():
            print(f"{count:3} {kind}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the wheel, or a directory of recipes")
    parser.add_argument("--notes", action="store_true", help="print what is noted of each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        calib = scratch / "calib.npz"
        np.savez(calib, input_ids=np.random.default_rng(0).integers(0, 320, (64, 256), np.int32))
        try:
            recipes = practice(args.source, scratch)
        except (OSError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{args.source}: no wheel and no directory ({error})") from None
        paths = sorted(recipes.rglob("*.yaml"))
        if not paths:
            raise SystemExit(f"{args.source}: no recipes, expected a wheel of msmodelslim")
        (scratch / "models").mkdir()
        models = Models(scratch / "models")
        os.chdir(scratch)
        found = [
            attempt(path, path.relative_to(recipes).as_posix(), models, calib, scratch)
            for path in paths
        ]
    report(found, args.notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
