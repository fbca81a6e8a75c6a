"""Where there is a compiler there are kernels: their other tests are left out without them."""

from __future__ import annotations

import os
import shutil

import pytest

from ms_quant import kernels


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(os.environ.get("MS_QUANT_ISA") == "none", reason="they are masked")
def test_the_library_is_built_where_there_is_a_compiler() -> None:
    assert kernels.available(), kernels.note()
