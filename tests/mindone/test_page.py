"""The example of docs/networks.md runs, and its table is what it prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from networks import NETWORKS

import ms_quant


def test_the_example_of_attention(capsys):
    page = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    section = page.partition("## Attention of diffusion networks\n")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    wan = NETWORKS["Wan"]
    three = replace(wan, settings={**wan.settings, "num_layers": 3})
    inputs = three.inputs()
    names = {"ms_quant": ms_quant, "build": three.build, "latent": inputs["hidden_states"]}
    names |= {"prompt": inputs["encoder_hidden_states"], "timesteps": [inputs["timestep"]] * 2}
    exec(code, names)
    printed = capsys.readouterr().out.splitlines()  # importing mindone prints, too
    lines = printed[[line[:5] for line in printed].index("path ") :]
    shown = section.partition("```\npath ")[2].splitlines()[0]
    assert lines[0].split() == ["path", *shown.split()]
    found = {line.split()[0]: line for line in lines[1:]}
    assert found["blocks.0.attn1"].split()[-4:] == ["FP8_DYNAMIC", "-", "2", "FP8_DYNAMIC"]
    dense_so_early = ["FP8_DYNAMIC", "+", "rf_v3", "0.8", "-", "2", "FP8_DYNAMIC"]
    assert found["blocks.1.attn1"].split()[-7:] == dense_so_early
    assert "FLOAT: not chosen" in found["blocks.2.attn1"]
    assert "FLOAT: cross" in found["blocks.2.attn2"]
