"""What a model file may say before torch reads it: weights, and a graph of operators that compute; no code.

`torch.export.load` unpickles what a file marks as pickled, evaluates its expressions and guards, looks up operators by
any path in torch (`torch.os.system`), and makes Python source of its names. So the file is written again from what was
understood, and only that is loaded.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from typing import Any

from training.documents import read_document
from training.errors import DamagedError

_MEMBER = re.compile(
    r"(archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt)"
)
GRAPH = "models/model.json"
CONFIGS = {"data/weights/model_weights_config.json": "weight", "data/constants/model_constants_config.json": "tensor"}
EXAMPLE = "data/sample_inputs/model.pt"
_WRITES_FILES = r"(?!from_file\b|save\b|_save\b|_load\b)"
_OPERATOR = re.compile(
    rf"torch\.ops\.(aten|prims)\.{_WRITES_FILES}\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast|while_loop|map_impl|scan)"
    r"|torch\.(_sym|sym)_[a-z]+|math\.(ceil|floor|trunc)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)",
    re.ASCII,
)
_SYMBOL = r"(?:Symbol\('[suzf]\d+'(?:, [a-z]+=(?:True|False))*\)|\b[suzf]\d+\b)"
_FUNCTIONS = (
    "Add|Mul|Integer|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|IntTrueDiv|FloatTrueDiv|FloorToInt"
    "|CeilToInt|TruncToInt|RoundToInt|ToFloat|TruncToFloat|Where|Identity|Eq|Ne|Ge|Gt|Le|Lt|And|Or|Not|floor|ceiling"
    "|Abs|int_oo|oo|True|False"
)
_EXPRESSION = re.compile(
    rf"({_SYMBOL}|Pow\({_SYMBOL}, Integer\((-1|2|3)\)\)|\b({_FUNCTIONS})\b"
    r"|\b\d{1,18}\b|\*(?!\*)|[!=<>]=|[-+/%(),<>&|~ ])*"
)
"""No text but a symbol's name, no attribute, and no power that would take for ever."""
MAX_EXPRESSION = 1000
_WORDS = re.compile(r"[\w.+]*", re.ASCII)
_TEXT = re.compile(r"[\w.,> -]*", re.ASCII)
_TREES = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict"})


def harmless(data: bytes) -> bytes:
    """The file again, without its example, its guards and its history. Raises `DamagedError` for all else."""
    members = understood(_members(data))
    rewritten = io.BytesIO()
    with zipfile.ZipFile(rewritten, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    return rewritten.getvalue()


def understood(members: dict[str, bytes]) -> dict[str, bytes]:
    """The same of its members by name."""
    for name, prefix in CONFIGS.items():
        _check_payloads(_document(members, name), prefix, members, name.rpartition("/")[0])
    graph = _document(members, GRAPH)
    graph["guards_code"] = []  # serving checks what it is asked, and these are evaluated
    _forget_history(graph)
    _check(graph)
    return {**members, GRAPH: json.dumps(graph).encode(), EXAMPLE: b""}


def _members(data: bytes) -> dict[str, bytes]:
    """By name, without the folder that all lie in. None is packed, so together they are no more than the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            for info in infos:
                _, _, name = info.filename.partition("/")
                if not _MEMBER.fullmatch(name) or info.compress_type != zipfile.ZIP_STORED:
                    raise DamagedError(f"the model file holds {info.filename!r}, which no exported program needs")
            if sum(info.file_size for info in infos) > len(data):
                raise DamagedError("the model file says that it is larger than it is")
            found = {info.filename.partition("/")[2]: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DamagedError(f"the model file is damaged: {error}") from error
    if len(found) != len(infos):
        raise DamagedError("the model file holds two members of one name")
    return found


def _document(members: dict[str, bytes], name: str) -> dict[str, Any]:
    if name not in members:
        raise DamagedError(f"the model file has no {name}")
    return read_document(members[name], what=f"{name} of the model file")


def _check_payloads(config: dict[str, Any], prefix: str, members: dict[str, bytes], folder: str) -> None:
    try:
        for name, payload in config["config"].items():
            place = str(payload["path_name"])
            if payload["use_pickle"] is not False or not re.fullmatch(rf"{prefix}_\d+", place, re.ASCII):
                raise DamagedError(f"the model file keeps {name!r} as a pickle, which would run code")
            num_items = math.prod(size["as_int"] for size in payload["tensor_meta"]["sizes"])
            if num_items and not members.get(f"{folder}/{place}"):
                raise DamagedError(f"the model file has no bytes of {name!r}")
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"the model file is damaged: its list of {folder} lacks {error}") from error
    _check(config)


def _forget_history(value: Any) -> None:
    """Where each operator came from: stack traces and paths, which name what may be anything."""
    for document in _documents(value):
        if "target" in document and "metadata" in document:
            document["metadata"] = {}


def _documents(value: Any) -> Iterator[dict[str, Any]]:
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            yield one
            rest.extend(one.values())
        elif isinstance(one, list):
            rest.extend(one)


def _check(value: Any) -> None:
    """Raises `DamagedError` for the first text that is not one of those that a program has."""
    for document in _documents(value):
        for key, item in document.items():
            _require(_WORDS.fullmatch(key), "a name", key)
            for text in item if isinstance(item, list) else (item,):
                if isinstance(text, str):
                    _check_text(key, text)


def _check_text(key: str, text: str) -> None:
    if key in ("target", "as_operator"):
        _require(_OPERATOR.fullmatch(text), "the operator", text)
    elif key == "expr_str":
        _require(len(text) <= MAX_EXPRESSION and _EXPRESSION.fullmatch(text), "the expression", text)
    elif key in ("in_spec", "out_spec"):
        for tree in _documents(read_document(f'{{"spec": {text or "null"}}}', what="a structure of the model file")):
            _require(tree.get("type") in _TREES, "the structure", text)
    elif key in ("as_string", "as_strings"):
        _require(_TEXT.fullmatch(text), "the text", text)
    else:
        _require(_WORDS.fullmatch(text), "the name", text)


def _require(is_known: Any, what: str, text: str) -> None:
    if not is_known:
        raise DamagedError(f"the model file has {what} {text[:80]!r}, which no program needs that only computes")
