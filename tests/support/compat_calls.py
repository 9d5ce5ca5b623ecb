"""Calls of ``overspill.compat`` with arguments that are right, for tests that try wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from overspill.compat import Llama, LlamaGrammar


def compat_calls(llm: Llama, folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Return each public function, and arguments with which it works, by name; ``llm`` has a chat template."""
    grammar = folder / "grammar.gbnf"
    grammar.write_text("root ::= [a-z]")
    llm.eval([1, 2])
    methods: dict[str, dict[str, Any]] = {
        "create_chat_completion": {"messages": "Hello", "max_tokens": 1},
        "create_chat_completion_openai_v1": {"messages": "Hello", "max_tokens": 1},
        "create_completion": {"prompt": "Hello", "max_tokens": 1},
        "detokenize": {"tokens": [1]},
        "eval": {"tokens": []},
        "generate": {"tokens": [1]},
        "logits_to_logprobs": {"logits": [1.0, 2.0]},
        "sample": {},
        "set_cache": {"cache": None},
        "set_seed": {"seed": 1},
        "tokenize": {"text": b"Hello"},
    }
    return {
        "Llama": (Llama, {"model_path": llm.model_path, "n_ctx": 64, "n_threads": 1}),
        "LlamaGrammar": (LlamaGrammar, {"grammar": "root ::= [a-z]"}),
        "LlamaGrammar.from_file": (LlamaGrammar.from_file, {"file": grammar}),
        "LlamaGrammar.from_json_schema": (LlamaGrammar.from_json_schema, {"json_schema": "{}"}),
        "LlamaGrammar.from_string": (LlamaGrammar.from_string, {"grammar": "root ::= [a-z]"}),
        **{f"Llama.{name}": (getattr(llm, name), given) for name, given in methods.items()},
    }
