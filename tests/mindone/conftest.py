"""Tests with mindone itself, which `make test-mindone` installs; not collected without it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HAS_MINDONE = find_spec("mindone") is not None
collect_ignore_glob = [] if HAS_MINDONE else ["test_*.py"]

if HAS_MINDONE:
    sys.path.insert(0, str(HERE))
    import mindspore as ms
    import shims

    ms.runtime.launch_blocking()
    shims.install()
    import mindone.diffusers  # noqa: F401 - after the operators that it is made of are there

    shims.replace_flash_attention()
    from networks import NETWORKS

    @pytest.fixture(params=NETWORKS)
    def known(request):
        return NETWORKS[request.param]
