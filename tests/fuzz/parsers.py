"""Every parser of what comes from storage or the network, with valid inputs of it, and what each may answer."""

from __future__ import annotations

from tests.fuzz import of_data, of_infra, of_network, of_presets, of_tasks, of_training
from tests.fuzz.parser import Parser

PARSERS: list[Parser] = [
    parser
    for module in (of_training, of_network, of_presets, of_data, of_tasks, of_infra)
    for parser in module.parsers()
]
