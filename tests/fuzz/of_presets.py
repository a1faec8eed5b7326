"""The parsers of presets: their files, what is stored of them, and settings on a command line."""

from __future__ import annotations

from typing import Any

from tests.fuzz.of_training import JOB, a_dict
from tests.fuzz.parser import MemoryFile, Parser
from training.documents import canonical_json, digest_of
from training.preset_file import load_preset, parse_override, preset_from_json

FILE = MemoryFile()
TOML = b"""name = "digits"
recipe = "training.recipes.digits:Digits"
seed = 3
hyperparameters = { width = 3 }

[data]
name = "digits"
source = "package://sklearn/datasets"
format = "csv"
glob = "*.csv"
exclude = ["a", "b"]

[train]
steps = 60
batch_size = 32
virtual_workers = 8
clip_norm = 1.0

[evaluate]
confidence = 0.95

[launch]
nodes = 2
silence_seconds = 3.0
"""
TOML_WORDS = (
    *(
        b"[[",
        b"]]",
        b"[",
        b"]",
        b"{",
        b"}",
        b"'''",
        b'"""',
        b"=",
        b".",
        b",",
        b"#",
        b"\\u0000",
        b"\\ud800",
        b"\\U00110000",
    ),
    *(b"1979-05-27T07:32:00Z", b"07:32:00", b"inf", b"-nan", b"0x10", b"0o7", b"1e400", b"1_0", b"true", b"9" * 5000),
    *(b"a = 1\n", b"[data]\n", b"[launch]\n", b"{a = 1}", b"[1, 'a']", b"[" * 2000, b"a.b.c = 1\n", b"\r", b"\x00"),
    *(b"{a=" * 400, b"[[a]]\n", b"''", b'""', b"-1", b"folder = 'x'\n", b"a." * 2000),
)
SETTING_WORDS = (b"train.steps", b"=", b"a.b", *TOML_WORDS)


def parsers() -> list[Parser]:
    return [
        Parser(name="a preset", seeds=(TOML,), parse=a_preset, words=TOML_WORDS),
        Parser(name="a preset as JSON", seeds=(canonical_json(JOB.preset.to_json()),), parse=a_preset_document),
        Parser(
            name="a setting of a preset", seeds=(b"train.steps=20", b'name="a"'), parse=a_setting, words=SETTING_WORDS
        ),
    ]


def a_preset(data: bytes) -> Any:
    """As a run of it is begun."""
    preset = load_preset(str(FILE.holding(data)))
    return canonical_json(preset.to_json()), digest_of(preset.determining())


def a_preset_document(data: bytes) -> Any:
    return canonical_json(preset_from_json(a_dict(data)).to_json())


def a_setting(data: bytes) -> Any:
    return parse_override(data.decode(errors="replace"))
