"""What is tried: a class per target, with inputs by chance and the check of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.runner import Target
from fuzz.targets.chats import ChatTemplates, Replies
from fuzz.targets.gguf_files import GgufFiles
from fuzz.targets.languages import Grammars, JsonSchemas
from fuzz.targets.prompts import Prompts
from fuzz.targets.sampling import Sampling
from fuzz.targets.saved import Chats, HardwareFiles, Placements, States, TunedFiles

__all__ = ["QUICK", "TARGETS"]

TARGETS: dict[str, Callable[[Path], Target[Any]]] = {
    "gguf": GgufFiles,
    "prompts": Prompts,
    "grammars": Grammars,
    "schemas": JsonSchemas,
    "templates": ChatTemplates,
    "replies": Replies,
    "chats": Chats,
    "placements": Placements,
    "hardware": HardwareFiles,
    "tuned": TunedFiles,
    "states": States,
    "sampling": Sampling,
}
# Inputs that take a few seconds.
QUICK = {
    "gguf": 60,
    "prompts": 40,
    "grammars": 100,
    "schemas": 150,
    "templates": 60,
    "replies": 100,
    "chats": 200,
    "placements": 300,
    "hardware": 100,
    "tuned": 100,
    "states": 200,
    "sampling": 1000,
}
