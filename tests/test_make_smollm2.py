"""tools/make_smollm2.py: what it undoes of GGUF, and the tokenizer that it writes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

PATH = Path(__file__).parents[1] / "tools" / "make_smollm2.py"
SPEC = importlib.util.spec_from_file_location("make_smollm2", PATH)
assert SPEC and SPEC.loader
make_smollm2 = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_smollm2)


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_of_a_head_have_the_halves_of_each_rotary_pair_apart(heads: int) -> None:
    size, columns = 8, 5
    original = np.arange(heads * size * columns, dtype=np.float32).reshape(-1, columns)
    paired = np.empty_like(original)
    for head in range(heads):
        for pair in range(size // 2):
            for half in range(2):
                row = head * size + half * size // 2 + pair
                paired[head * size + 2 * pair + half] = original[row]
    np.testing.assert_array_equal(make_smollm2.rotate_half_rows(paired, heads), original)


def test_names() -> None:
    found = [make_smollm2.hf_name(name) for name in ("token_embd.weight", "blk.7.ffn_down.weight")]
    assert found == ["model.embed_tokens.weight", "model.layers.7.mlp.down_proj.weight"]


def field(pre: str = "smollm") -> dict:
    tokens = ["<|im_end|>", "1", "2", "12", "a", "Ġ", "Ġa", "Ċ"]
    return {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * 7,
        "tokenizer.ggml.merges": ["1 2", "Ġ a"],
    }


def test_tokenizer_splits_digits_and_knows_special_tokens() -> None:
    made = Tokenizer.from_str(json.dumps(make_smollm2.make_tokenizer(field())))
    text = "a a12\n<|im_end|>"
    ids = made.encode(text).ids
    assert ids == [4, 6, 1, 2, 7, 0]  # "12" is a token, but every digit is a piece of its own
    assert made.decode(ids, skip_special_tokens=False) == text


def test_another_pre_tokenizer_is_refused() -> None:
    with pytest.raises(SystemExit, match="llama3, expected smollm"):
        make_smollm2.make_tokenizer(field("llama3"))
