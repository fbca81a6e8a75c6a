"""Compares what is understood of msModelSlim's recipes with what its own code parses of them.

Where msmodelslim is installed (with torch and transformers), let it read its recipes and apply
them to the names of a dense decoder:

    python tools/compare_modelslim_recipes.py RECIPES --dump theirs.json

and compare, where ms-quant is installed:

    python tools/compare_modelslim_recipes.py RECIPES --compare theirs.json

RECIPES is the directory ``msmodelslim/lab_practice``. For each linear of the decoder the scheme is
compared, and for each kind of smoothing the linears that it is for.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

LAYERS = 64
MEMBERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
GROUPS = [
    [f"model.layers.{index}.{member}" for member in members]
    for index in range(LAYERS)
    for members in MEMBERS.values()
]
LINEARS = [path for group in GROUPS for path in group]
SMOOTHING = ("smooth_quant", "iter_smooth", "flex_smooth_quant", "flex_awq_ssz", "awq")
SCHEMES = {  # what its qconfig says of activation and weight, and what it is called here
    ("int8_per_tensor_asym", "int8_per_channel_sym"): "W8A8",
    ("int8_per_token_sym", "int8_per_channel_sym"): "W8A8_DYNAMIC",
    ("int8_pd_mix_asym", "int8_per_channel_sym"): "W8A8_MIX",
    ("float_per_tensor_sym", "int8_per_channel_sym"): "W8A16",
    ("int8_per_token_sym", "int4_per_channel_sym"): "W4A8_DYNAMIC",
    ("mxfp8_per_block_sym", "mxfp8_per_block_sym"): "W8A8_MXFP8",
    ("mxfp8_per_block_sym", "mxfp4_per_block_sym"): "W4A8_MXFP",
    ("mxfp4_per_block_sym", "mxfp4_per_block_sym"): "W4A4_MXFP4",
}
METHODS = {"gptq": "gptq", "ssz": "ssz", "histogram": "histogram"}


def dump(recipes: Path) -> dict[str, Any]:
    """What its own classes make of each recipe."""
    found = {}
    for path in sorted(recipes.rglob("*.yaml")):
        document = yaml.safe_load(path.read_text("utf-8"))
        read = _older if document["apiversion"] == "modelslim_v0" else _newer
        try:
            found[path.relative_to(recipes).as_posix()] = read(document)
        except Exception as error:  # of a class of its own
            found[path.relative_to(recipes).as_posix()] = {"error": str(error)}
    return found


def _newer(document: dict[str, Any]) -> dict[str, Any]:
    import msmodelslim.processor  # noqa: F401
    from msmodelslim.core.quant_service.modelslim_v1.quant_config import ModelslimV1ServiceConfig
    from msmodelslim.core.quant_service.multimodal_sd_v1.quant_config import (
        MultimodalSDServiceConfig,
    )
    from msmodelslim.core.quant_service.multimodal_vlm_v1.quant_config import (
        MultimodalVLMServiceConfig,
    )
    from msmodelslim.model.qwen3.model_adapter import Qwen3ModelAdapter
    from msmodelslim.processor.anti_outlier.smooth_base import BaseSmoothProcessor
    from msmodelslim.utils.config_map import ConfigSet

    kinds = {
        "modelslim_v1": ModelslimV1ServiceConfig,
        "multimodal_vlm_modelslim_v1": MultimodalVLMServiceConfig,
        "multimodal_sd_modelslim_v1": MultimodalSDServiceConfig,
    }
    spec = kinds[document["apiversion"]].model_validate(document["spec"])
    adapter = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=LAYERS))
    subgraphs = Qwen3ModelAdapter.get_adapter_config_for_subgraph(adapter)  # type: ignore[arg-type]
    processors = []
    for processor in spec.process:
        processors += processor.configs if processor.type == "group" else [processor]
    linears: dict[str, Any] = {}
    smoothing: dict[str, list[str]] = {}
    for processor in processors:
        if processor.type == "linear_quant":
            include, exclude = ConfigSet(processor.include), ConfigSet(processor.exclude)
            qconfig = processor.qconfig
            said = [_kind(qconfig.act), _kind(qconfig.weight)]
            methods = [qconfig.act.method, qconfig.weight.method]
            for path in LINEARS:  # what one has made no linear any more, the next leaves alone
                if path in include and path not in exclude:
                    linears.setdefault(path, [*said, *methods])
        elif processor.type == "float_sparse":
            include, exclude = ConfigSet(processor.include or ["*"]), ConfigSet(processor.exclude)
            for path in LINEARS:
                if path in include and path not in exclude:
                    linears.setdefault(path, ["W16A16S", 1])
        elif processor.type in SMOOTHING:
            subgraph_types = getattr(processor, "enable_subgraph_type", ["norm-linear"])
            config = SimpleNamespace(
                enable_subgraph_type=subgraph_types,
                include=processor.include,
                exclude=processor.exclude,
            )
            reached = BaseSmoothProcessor._filter_adapter_configs_by_config(
                None,
                subgraphs,
                config,
                "model",  # type: ignore[arg-type]
            )
            targets = [name for one in reached for name in one.mapping.targets]
            smoothing.setdefault(processor.type, []).extend(targets)
    return {
        "linears": linears,
        "smoothing": {name: sorted(targets) for name, targets in smoothing.items()},
        "types": [processor.type for processor in processors],
    }


def _kind(qconfig: Any) -> str:
    scheme = qconfig.to_scheme()
    even = "sym" if scheme.symmetric else "asym"
    return f"{scheme.dtype.value}_{scheme.scope.value}_{even}"


def _older(document: dict[str, Any]) -> dict[str, Any]:
    from msmodelslim.core.quant_service.modelslim_v0.quant_config import load_specific_config
    from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlierConfig
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import QuantConfig
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.layer_config_manager import LayerConfigManager

    spec = load_specific_config(document["spec"])
    config = QuantConfig(dev_type="cpu", **(spec.calib_cfg or {}))
    store = {"default": config, "rollback": QuantConfig(w_bit=16, a_bit=16)}
    store["float"] = store["rollback"]
    if config.w_bit == 8:
        for name, convert in (
            ("w8a8", LayerConfigManager.convert_to_w8a8),
            ("w8a8_dynamic", LayerConfigManager.convert_to_w8a8_dynamic),
            ("w8a16", LayerConfigManager.convert_to_w816),
        ):
            try:
                store[name] = convert(config)
            except Exception:  # as its Calibrator does: it is missing then
                continue
    params = spec.calib_params or {}
    manager = LayerConfigManager(params.get("mix_cfg"), store, list(config.disable_names))
    linears = {}
    for path in LINEARS:
        chosen = manager.build_layer_config(path)
        kind = str(getattr(chosen.model_quant_type, "value", chosen.model_quant_type))
        if kind != "FLOAT":
            mixed = kind == "W8A8" and chosen.pdmix
            linears[path] = ["W8A8_MIX" if mixed else kind, chosen.act_method]
    anti = None if spec.anti_cfg is None else AntiOutlierConfig(dev_type="cpu", **spec.anti_cfg)
    smoothing: dict[str, list[str]] = {}
    if anti is not None:
        off = set(anti.disable_anti_names)
        kept = [group for group in GROUPS if not off & set(group)]
        smoothing[anti.anti_method] = sorted(path for group in kept for path in group)
    return {"linears": linears, "smoothing": smoothing, "level": params.get("disable_level", "L0")}


def compare(recipes: Path, theirs: dict[str, Any]) -> int:
    """Prints what differs; the number of recipes in which something does."""
    from ms_quant.errors import MsQuantError
    from ms_quant.recipe import assign, load_recipe

    counts = {"same": 0, "refused here": 0, "different": 0}
    producers = {path: _producer(path) for path in LINEARS}
    names = {path: _group(path) for path in LINEARS}
    for name, wanted in theirs.items():
        try:
            recipe = load_recipe(recipes / name)
            made = assign(recipe, names, producers)
        except MsQuantError as error:
            counts["refused here"] += 1
            print(f"{name}: refused here: {str(error).removeprefix(f'{recipes / name}: ')}")
            continue
        if "error" in wanted:
            counts["different"] += 1
            print(f"{name}: refused there: {' '.join(wanted['error'].split())}")
            continue
        problems = [*_linears(made, wanted), *_smoothing(recipe, names, producers, wanted)]
        counts["different" if problems else "same"] += 1
        for problem in problems[:3]:
            print(f"{name}: {problem}")
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return counts["different"]


def _linears(made: Any, wanted: dict[str, Any]) -> list[str]:
    problems = []
    for path in LINEARS:
        there = wanted["linears"].get(path)
        here = made.get(path)
        if there is None or here is None:
            if (there is None) != (here is None):
                problems.append(f"{path} is {here} here and {there} there")
            continue
        if len(there) == 2:  # of the older engine
            scheme, methods = there[0], {"histogram"} if there[1] == 2 else set()
            methods &= {"histogram"} if scheme in ("W8A8", "W8A8_MIX", "W8A8S") else set()
        else:
            scheme = SCHEMES[there[0], there[1]]
            methods = {METHODS[method] for method in there[2:] if method in METHODS}
        ours = {name for name in here.algorithms if name in METHODS}
        if here.scheme != scheme or ours != methods:
            problems.append(f"{path} is {here.scheme} {ours} here and {scheme} {methods} there")
    return problems


def _smoothing(
    recipe: Any, names: dict[str, str], producers: dict[str, str], wanted: dict[str, Any]
) -> list[str]:
    from ms_quant.recipe import matches

    steps = [step for step in recipe.steps if step.algorithm not in ("quarot", "svd")]
    ours: list[list[str]] = []
    for step in steps:
        reached = []
        for path in LINEARS:
            name = producers[path] if step.by_producer else path
            if names[path] in step.groups and matches(name, step.include, step.exclude):
                reached.append(path)
        ours.append(sorted(reached))
    there = list(wanted["smoothing"].values())
    if ours != there:
        return [f"smoothing is of {[len(s) for s in ours]} linears here, {[len(s) for s in there]}"]
    return []


def _group(path: str) -> str:
    tail = path.split(".", 3)[3]
    return next(name for name, members in MEMBERS.items() if tail in members)


def _producer(path: str) -> str:
    feeds = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
    feeds |= {"o": "self_attn.v_proj", "down": "mlp.up_proj"}
    return ".".join(path.split(".", 3)[:3]) + "." + feeds[_group(path)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", type=Path)
    parser.add_argument("--dump", type=Path, help="file to write, with msmodelslim's own code")
    parser.add_argument("--compare", type=Path, help="file to compare with")
    args = parser.parse_args()
    if args.dump:
        args.dump.write_text(json.dumps(dump(args.recipes)))
    if args.compare:
        return 1 if compare(args.recipes, json.loads(args.compare.read_text())) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
