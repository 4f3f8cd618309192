"""The side files of a model as transformers may see them: in a private directory, without foreign paths.

Covers: writing the files for the moment of building, and taking out of the tokenizer's settings whatever
transformers would open as a path of this machine. Does not cover: which files and settings a directory
may have at all (``packer/directory.py``) or reading them (``transformers``).

transformers hands the keys of ``tokenizer_config.json`` and ``special_tokens_map.json`` to the tokenizer
as arguments. Some of those are paths: ``"vocab": "/some/file"`` makes a vocabulary of any file that this
process can read, and its lines then come out of the model as tokens.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from packer.directory import TOKENIZER_SETTINGS, is_path_setting


class BadSideFile(Exception):
    """A side file can not be used. Names it and what is wrong."""


@contextmanager
def written(files: Mapping[str, bytes], private: Path) -> Iterator[str]:
    """The files in a directory that exists only inside the block. Raises ``BadSideFile``."""
    root = Path(tempfile.mkdtemp(dir=private))
    try:
        for path, data in files.items():
            parts = path.split("/")
            # Paths were checked when the version was registered; here they become real files.
            if path.startswith("/") or not all(part.strip(".") for part in parts):
                raise BadSideFile(f"{path[:80]!r} is not a plain relative path")
            target = root.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(harmless(data, path) if path in TOKENIZER_SETTINGS else data)
        yield str(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def harmless(data: bytes, path: str) -> bytes:
    """Tokenizer settings without those that name files or stand for constructor arguments.

    Directories saved by older versions carry such paths of the machine that saved them, so they are left
    out rather than refused. Raises ``BadSideFile``.
    """
    try:
        settings = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSideFile(f"{path}: is not JSON: {str(error)[:200]}") from None
    if not isinstance(settings, dict):
        raise BadSideFile(f"{path}: is not a JSON object")
    kept = {key: value for key, value in settings.items() if not is_path_setting(key)}
    return json.dumps(kept).encode()
