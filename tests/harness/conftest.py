"""Tests with clients of others, which `make test-harness` installs; not collected without them."""

from importlib.util import find_spec

HAS_CLIENTS = all(find_spec(name) for name in ("lm_eval", "openai"))
collect_ignore_glob = [] if HAS_CLIENTS else ["test_*.py"]
