"""Files that go with a model's tensors: tokenizer, templates, pooling, custom code, licence.

They are copied as they are, JSON without a byte order mark, and never executed. A file is found by
its name, or because another names it: ``auto_map`` the Python files, ``modules.json`` the
directories of sentence-transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ms_quant.errors import BadFileError
from ms_quant.files.strict_json import parse_json, read_json, without_mark

MAX_BYTES, MAX_CODE_BYTES, MAX_FILES = 256 << 20, 4 << 20, 512
MODULES, TEMPLATES = "modules.json", "additional_chat_templates"
MAX_MODULES_BYTES = 1 << 20
CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
"""Files whose ``auto_map`` names custom code."""
PATTERNS = (
    r"tokenizer[\w.-]*\.(json|model)(\.v\d+)?",
    r"(added_tokens|special_tokens_map|vocab|tekken|generation_config|configuration)\.json",
    r"(vocab|merges)\.txt",
    r"[\w.-]+\.(tiktoken|spm)|(spiece|sentencepiece[\w.]*)\.model",
    r"chat_template[\w.-]*\.(jinja|json)",
    r"(processor|(video_|image_)?preprocessor)_config\.json",
    r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json",
    r"(licen[cs]e|notice|copying|copyright|(acceptable_)?use_policy)([\w .-]*\.(txt|md)|[\w-]*)",
)
"""Names of files that are copied, whatever their case."""
_NAMES = re.compile("|".join(PATTERNS), re.IGNORECASE)
_PLACE = re.compile(r"\w[\w.-]*")


def companion_files(directory: Path) -> tuple[str, ...]:
    """Paths in a model directory, with ``/``, of the files that go with its tensors, sorted.

    Raises:
        MsQuantError: one is larger than such files are, there are too many, or ``modules.json``
            names a directory that is not in the model's.
    """
    own = (path.name for path in directory.iterdir() if _is_file(path))
    found = [name for name in own if is_companion(name)]
    if custom_code(directory):
        found += [path.name for path in directory.glob("*.py") if _is_file(path)]
    for place in (*_module_paths(directory), TEMPLATES):
        found += [f"{place}/{path.name}" for path in _inside(directory / place)]
    for name in found:
        limit, size = _limit(name), (directory / name).stat().st_size
        if size > limit:
            raise BadFileError(
                f"{directory / name}: {size} bytes, expected at most {limit} of a file to copy"
            )
    if len(found) > MAX_FILES:
        raise BadFileError(
            f"{directory}: has {len(found)} files beside its tensors, expected at most {MAX_FILES}"
        )
    return tuple(sorted(set(found)))


def companion_bytes(path: Path) -> bytes:
    """The content of a file as it is copied: runtimes read no JSON behind a byte order mark."""
    content = path.read_bytes()
    return without_mark(content) if path.suffix.lower() == ".json" else content


def is_companion(name: str) -> bool:
    """Whether a file of this name goes with a model's tensors."""
    return bool(_NAMES.fullmatch(name))


def _limit(name: str) -> int:
    return MAX_CODE_BYTES if name.endswith(".py") else MAX_BYTES


def _is_file(path: Path) -> bool:
    """Whether it is a regular file or, as in a hub's cache, a link to one."""
    return path.is_file() and not path.name.startswith(".")


def _inside(place: Path) -> Iterator[Path]:
    """The files of a directory that is copied.

    Raises:
        MsQuantError: it is a link, or holds a directory in its turn.
    """
    if place.is_symlink():
        raise BadFileError(f"{place}: is a symbolic link, expected a directory of the model")
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.is_dir():
            raise BadFileError(f"{path}: is a directory, expected only files in {place.name} here")
        if _is_file(path):
            yield path


def _module_paths(directory: Path) -> list[str]:
    """Directories of the modules after the model itself, as sentence-transformers lists them.

    Raises:
        MsQuantError: the list is malformed, or names a place elsewhere.
    """
    path = directory / MODULES
    if not path.is_file():
        return []
    if path.stat().st_size > MAX_MODULES_BYTES:
        raise BadFileError(f"{path}: expected at most {MAX_MODULES_BYTES} bytes")
    try:
        modules = parse_json(without_mark(path.read_bytes()))
    except ValueError as error:
        raise BadFileError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(modules, list) or not all(isinstance(item, Mapping) for item in modules):
        raise BadFileError(f"{path}: is {modules!r:.80}, expected a list of modules")
    paths = []
    for module in modules:
        found, kind = module.get("path", ""), str(module.get("type", ""))
        if found == "":
            continue
        if not isinstance(found, str) or not _PLACE.fullmatch(found):
            raise BadFileError(
                f"{path}: a module has the path {found!r:.80}, expected the name of a directory "
                "of the model"
            )
        if kind.rpartition(".")[2] == "Transformer":
            raise BadFileError(
                f"{path}: the model itself is in {found}, expected it beside {MODULES}: give "
                f"{directory / found}"
            )
        paths.append(found)
    return paths


def custom_code(directory: Path) -> dict[str, list[str]]:
    """The custom classes that configs name: file to ``KIND file.Class`` as they spell it."""
    found: dict[str, list[str]] = {}
    for name in CONFIGS:
        path = directory / name
        named = read_json(path, MAX_BYTES).get("auto_map") if path.is_file() else None
        for kind, classes in named.items() if isinstance(named, Mapping) else ():
            for spelled in classes if isinstance(classes, list) else [classes]:
                if isinstance(spelled, str):
                    found.setdefault(name, []).append(f"{kind} {spelled}")
    return found


def code_notes(directory: Path) -> list[str]:
    """What to know of custom code, one sentence each."""
    notes = []
    for name, classes in custom_code(directory).items():
        listed = ", ".join(classes[:4])
        notes.append(
            f"{directory / name}: auto_map names custom code ({listed:.200}), which is copied, "
            "neither read nor run; what is computed here is the family's own"
        )
        for named in classes:
            module = named.partition(" ")[2].rpartition(".")[0]
            if "--" in module:
                notes.append(
                    f"{directory / name}: {named:.120} is in another repository, and not copied"
                )
            elif not (directory / f"{module}.py").is_file():
                notes.append(
                    f"{directory / name}: auto_map names {named:.120}, but there is no {module}.py"
                )
    return notes
