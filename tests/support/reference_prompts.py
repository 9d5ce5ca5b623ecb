"""Render conversations with the ``transformers`` library, as the reference for ``test_chat.py``.

    pip install transformers==5.24.0 jinja2
    python tests/support/reference_prompts.py vendor/llama.cpp/models/templates > tests/support/reference_prompts.json

The templates are those of llama.cpp's ``models/templates``, and SmolLM2's, which stands in its file.
"""

from __future__ import annotations

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


def main(folder: Path) -> None:
    """Write the reference to standard output."""
    import jinja2
    from transformers.utils.chat_template_utils import (  # type: ignore[import-not-found]
        render_jinja_template,
    )

    prompts: dict[str, dict[str, list[str]]] = {}
    for name, file in TEMPLATES.items():
        template = (folder / f"{file}.jinja").read_text() if file else SMOLLM2
        prompts[name] = {}
        for about, messages in CONVERSATIONS.items():
            try:
                # With thinking and without; llama.cpp gives Llama's templates today's date, too.
                texts = [
                    render_jinja_template(
                        [messages],
                        chat_template=template,
                        add_generation_prompt=True,
                        bos_token=BOS,
                        eos_token=EOS,
                        enable_thinking=thinking,
                        date_string="TODAY",
                    )[0][0]
                    for thinking in (True, False)
                ]
            except jinja2.TemplateError as error:  # a role that the template does not know
                sys.stderr.write(f"{name}, {about}: {error}\n")
                continue
            dates = [datetime.now().strftime(form) for form in ("%Y-%m-%d", "%d %b %Y")]
            prompts[name][about] = [text.replace(dates[0], "TODAY").replace(dates[1], "TODAY") for text in texts]
    sys.stdout.write(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
