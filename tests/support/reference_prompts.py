"""Render conversations with the ``transformers`` library, as the reference for ``test_chat_template.py``.

    pip install transformers==5.24.0 jinja2
    python tests/support/reference_prompts.py vendor/llama.cpp/models/templates

writes two files beside this one. ``reference_prompts.json`` has some prompts, letter by letter, and
``reference_digests.json`` digests of prompts of all templates in llama.cpp's ``models/templates`` and all conversations
here: null where ``transformers`` refuses. SmolLM2's template stands in its file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

# Of SmolLM2's vocabulary, with which the test renders.
BOS, EOS = "<|im_start|>", "<|im_end|>"
TEMPLATES = {
    "smollm2": "",
    "gpt-oss": "openai-gpt-oss-120b",
    "qwen3": "Qwen-Qwen3-0.6B",
    "llama 3.1": "meta-llama-Llama-3.1-8B-Instruct",
    "llama 3.2": "meta-llama-Llama-3.2-3B-Instruct",
    "gemma 2": "google-gemma-2-2b-it",
    "gemma 4": "google-gemma-4-31B-it",
    "deepseek r1": "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek v3.1": "deepseek-ai-DeepSeek-V3.1",
}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": "Why is the sky blue?"}],
    "with a system message": [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "two turns": [
        {"role": "user", "content": "日本の首都は?"},
        {"role": "assistant", "content": "東京です。"},
        {"role": "user", "content": "  Its population,\nplease & <thanks> 🙂 "},
    ],
    "five turns": [
        message
        for i in range(4)
        for message in (
            {"role": "user", "content": f"Question {i}?"},
            {"role": "assistant", "content": f"Answer {i}."},
        )
    ]
    + [{"role": "user", "content": "And now?"}],
}


_WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Get the "weather" of <a city> & more: é.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city", "enum": ["Paris", "東京"]},
                "days": {"type": "integer", "description": "How many", "default": 3},
            },
            "required": ["city"],
        },
    },
}
_QUESTION = {"role": "user", "content": "Why is the sky blue?"}
_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "abcdef123",
            "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}},
        }
    ],
}
_RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "abcdef123", "name": "get_weather", "content": '{"t": 20}'}


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


# Messages, and the arguments of ChatTemplate.render.
ALL: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "question": ([_QUESTION], {}),
    "system": ([{"role": "system", "content": "Be brief."}, _QUESTION], {}),
    "turns": (
        [
            _QUESTION,
            {"role": "assistant", "content": "日本 é"},
            {"role": "user", "content": " more\n <x> & 'y' \"z\" 🙂 "},
        ],
        {},
    ),
    "empty": ([{"role": "user", "content": ""}], {}),
    "tools": ([_QUESTION], {"tools": [_WEATHER]}),
    "call": ([_QUESTION, _CALL, _RESULT], {"tools": [_WEATHER]}),
    "after a call": (
        [_QUESTION, _CALL, _RESULT, {"role": "assistant", "content": "It is 20."}, _QUESTION],
        {"tools": [_WEATHER]},
    ),
    "parts": ([{"role": "system", "content": _parts("Be brief.")}, {"role": "user", "content": _parts("a", "b")}], {}),
    "parts of a result": ([_QUESTION, _CALL, {**_RESULT, "content": _parts("20")}], {"tools": [_WEATHER]}),
    "reasoning": (
        [_QUESTION, {"role": "assistant", "content": "Because.", "reasoning_content": "Let me think."}, _QUESTION],
        {},
    ),
    "reasoning and a call": (
        [_QUESTION, {**_CALL, "content": "Wait.", "reasoning_content": "Let me think."}, _RESULT],
        {"tools": [_WEATHER]},
    ),
    "effort": (
        [_QUESTION, {"role": "assistant", "content": "<think>So.</think>\n\nBecause."}, _QUESTION],
        {"reasoning_effort": "high"},
    ),
}


def undated(text: str) -> str:
    """Return a prompt with a word in place of today's date."""
    for form in ("%Y-%m-%d", "%d %b %Y", "%b %d %Y", "%B %d, %Y", "%d %B %Y", "%A, %B %d, %Y"):
        text = text.replace(datetime.now().strftime(form), "TODAY")
    return text


def digest(text: str) -> str:
    """Return a short digest of a prompt."""
    return hashlib.sha256(undated(text).encode()).hexdigest()[:16]


def with_transformers(template: str, messages: list[dict[str, Any]], options: dict[str, Any], thinking: bool) -> str:
    """Return the prompt that ``transformers`` makes."""
    from transformers.utils import chat_template_utils  # type: ignore[import-not-found,unused-ignore]

    given = copy.deepcopy(options)
    prompts = chat_template_utils.render_jinja_template(
        [copy.deepcopy(messages)],
        tools=given.pop("tools", None),
        chat_template=template,
        add_generation_prompt=True,
        bos_token=BOS,
        eos_token=EOS,
        # We tell templates of all of these; Llama's tell an old date without one.
        enable_thinking=thinking,
        thinking=thinking,
        date_string="TODAY",
        datetime="TODAY",
        **given,
    )[0]
    return str(prompts[0])


def digests(folder: Path) -> dict[str, dict[str, list[str | None]]]:
    """Return digests with thinking and without, by template and conversation."""
    all_digests: dict[str, dict[str, list[str | None]]] = {}
    for file in sorted(folder.glob("*.jinja")):
        template = file.read_text(encoding="utf-8")
        of_file = all_digests[file.stem] = {}
        for about, (messages, options) in ALL.items():
            of_file[about] = []
            for thinking in (True, False):
                try:
                    of_file[about].append(digest(with_transformers(template, messages, options, thinking)))
                except Exception as error:
                    sys.stderr.write(f"{file.stem}, {about}: {type(error).__name__} {error}\n")
                    of_file[about].append(None)
    return all_digests


def main(folder: Path) -> None:
    """Write the references beside this file."""
    import jinja2

    prompts: dict[str, dict[str, list[str]]] = {}
    for name, file in TEMPLATES.items():
        template = (folder / f"{file}.jinja").read_text(encoding="utf-8") if file else SMOLLM2
        prompts[name] = {}
        for about, messages in CONVERSATIONS.items():
            try:
                texts = [with_transformers(template, messages, {}, thinking) for thinking in (True, False)]
            except jinja2.TemplateError as error:  # a role that the template does not know
                sys.stderr.write(f"{name}, {about}: {error}\n")
                continue
            prompts[name][about] = [undated(text) for text in texts]
    here = Path(__file__).parent
    for stem, content in (("prompts", prompts), ("digests", digests(folder))):
        written = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (here / f"reference_{stem}.json").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
