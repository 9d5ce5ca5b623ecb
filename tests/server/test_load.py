"""Sixty-four clients at once, a third of which leave in the middle: nothing is lost, wrong, or kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_fixtures import with_template
from overspill import Model
from server_load import LONGEST, QUESTIONS, Answered, load, mixed
from servers import Server, serving

N_REQUESTS = 2000
TEMPLATE = "Qwen-Qwen2.5-7B-Instruct"


# Batches that round otherwise may choose other experts, which moves the tiny model's logits by up to 3.5. Its likeliest
# token is some 14 over the mean of all.
NATS = 4.0


def check_likely(model: Model, question: str, tokens: Sequence[int], banned: int) -> None:
    """Assert that each token is about as likely as the likeliest one after those before it, but for a banned one."""
    model.reset()
    logits = model.eval(model.chat_template.prepare(question).tokens)
    for token in tokens:
        allowed = logits.copy()
        allowed[banned] = -100
        assert allowed[token] > allowed.max() - NATS
        logits = model.eval([token])


def requests_by_status(server: Server) -> Counter[int]:
    """Return the requests for replies that the server has answered, by their status."""
    text = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r'overspill_requests_total\{path="/v1/chat/completions",status="(\d+)"\} (\S+)', text)
    return Counter({int(status): int(float(n)) for status, n in found})


def resident_bytes(server: Server) -> int:
    """Return the server's memory."""
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.slow
def test_many_clients(tiny_gpt_oss_path: Path, tmp_path: Path) -> None:
    """Each request has its answer, which is the engine's own; memory is flat, and nothing runs at the end."""
    model_path = with_template(tiny_gpt_oss_path, tmp_path / "tiny.gguf", TEMPLATE)
    asked = mixed(N_REQUESTS, seed=1)
    with Model(model_path, n_ctx=256, offload="cpu") as model:
        ids = {model.token_bytes(i): i for i in range(model.n_vocab)}
        (end,) = (i for i in range(model.n_vocab) if model.is_end_of_generation(i))
        answers: list[Answered] = []
        with serving(model_path, "--ctx", 256, "--parallel", 8, "--offload", "cpu") as server:
            options: dict[str, Any] = {"logprobs": True, "logit_bias": {str(end): -100}}
            answers += load(server.url, asked[: N_REQUESTS // 4], **options)
            early_bytes = resident_bytes(server)
            answers += load(server.url, asked[N_REQUESTS // 4 :], **options)
            server.wait_until_free()
            late_bytes, counts = resident_bytes(server), requests_by_status(server)

        assert Counter(answer.asked for answer in answers) == Counter(asked)
        expected_counts = Counter({200: N_REQUESTS, 429: sum(answer.n_refused for answer in answers)})
        assert counts == +expected_counts
        assert late_bytes < early_bytes * 1.05 + (4 << 20)

        greedy: dict[str, Any] = {"temperature": 0, "max_tokens": LONGEST, "logit_bias": {end: -100}}
        expected = {question: [token.id for token in model.chat(question, **greedy)] for question in QUESTIONS}
        n_same = 0
        for answer in answers:
            asked_for = answer.asked
            tokens = [ids[bytes(token["bytes"])] for token in answer.tokens]
            if asked_for.leave_after is None:
                assert len(tokens) == answer.n_tokens == asked_for.n_tokens
                assert answer.finish_reason == "length"
            else:
                assert len(tokens) == asked_for.leave_after
            if tokens == expected[asked_for.question][: len(tokens)]:
                n_same += 1
            else:
                check_likely(model, asked_for.question, tokens, end)
        assert n_same > N_REQUESTS // 2
