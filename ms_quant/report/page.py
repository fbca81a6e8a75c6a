"""One file of HTML: what is in it is escaped, and nothing but our own script runs.

The policy in the page's head names the digest of the script and forbids everything that would be
loaded. A name in a checkpoint that is a script is text here; were it more, it would not run.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from ms_quant.errors import BadArgumentError
from ms_quant.files.atomic import write_bytes
from ms_quant.report.strange import readable

FOOT = "Made by ms-quant {}. The page needs no network; nothing in it is sent anywhere."
_PAGE = Markup(
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">\n"
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n'
    "<style>\n{style}</style>\n</head>\n<body{reload}>\n<h1>{title}</h1>\n{body}\n"
    '<p class="foot">{foot}</p>\n<script>{script}</script>\n</body>\n</html>\n'
)


def render(title: str, parts: Iterable[Markup], reload_seconds: int = 0) -> str:
    """The whole page.

    Args:
        title: what it is about.
        parts: its content, in order.
        reload_seconds: after how many seconds it reads itself again; 0 is never.
    """
    from ms_quant import __version__

    style, script = (_file(name) for name in ("page.css", "page.js"))
    page = _PAGE.format(
        digest=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=readable(title),
        style=Markup(style),
        reload=Markup(' data-reload="{}"').format(reload_seconds) if reload_seconds else "",
        body=Markup("\n").join(part for part in parts if part),
        foot=FOOT.format(__version__),
        script=Markup(script),
    )
    return str(page)


def write_page(path: Path, text: str) -> None:
    """Writes a page, which appears when it is whole.

    Raises:
        MsQuantError: the file cannot be written.
    """
    write_bytes(path, text.encode())


def check_page(path: Path, checkpoint: Path | None = None) -> None:
    """Refuses what would fail after the work, or spoil a checkpoint.

    Args:
        path: the HTML file to make.
        checkpoint: the directory that it will be about.

    Raises:
        MsQuantError: the path is a directory, lies in none or in the checkpoint, whose files are
            all accounted for, or is a file that is no page.
    """
    if path.is_dir():
        raise BadArgumentError(f"{path}: is a directory, expected the name of an HTML file")
    if not path.absolute().parent.is_dir():
        raise BadArgumentError(
            f"{path}: cannot be made, expected a file name in a directory there is"
        )
    if checkpoint is not None and path.resolve().is_relative_to(checkpoint.resolve()):
        raise BadArgumentError(
            f"{path}: lies in the checkpoint {checkpoint}, where verify would refuse it; "
            "expected a file elsewhere"
        )
    if path.exists() and not _is_page(path):
        raise BadArgumentError(
            f"{path}: exists and is no HTML page, expected a new file, or a page to replace"
        )


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    return not start or start.startswith((b"<!doctype html", b"<html"))


def _file(name: str) -> str:
    return (files("ms_quant.report") / name).read_text(encoding="utf-8")
