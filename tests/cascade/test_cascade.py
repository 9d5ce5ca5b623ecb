"""Two models that answer together: who answers, why, what is kept, and which models are in memory."""

from __future__ import annotations

import gc
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import overspill
from overspill import Cascade, ChatTemplate, Draft, Judgement, Model, StopReason, mean_entropy, mean_logprob
from overspill.cascade.budget import fit_together
from overspill.cascade.signals import Escalation
from overspill.header.info import ModelInfo

# A step that is to be ended takes long on a CPU, and not on a GPU.
pytestmark = pytest.mark.usefixtures("no_gpu")

PROMPT = "Once upon a time"
QUESTION = "Name a colour."
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
# The other model, so to speak: the same weights, asked in other words.
OTHER_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\nIn French: {{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def always(draft: Draft) -> bool:
    """Ask the large model whatever the small one said."""
    return True


def never(draft: Draft) -> bool:
    """Be content with the small model."""
    return False


@pytest.fixture(scope="module")
def other(smollm2_path: Path) -> Iterator[Model]:
    """Return the large model of the chats."""
    with Model(smollm2_path, n_ctx=1024, n_threads=2) as model:
        model.chat_template = ChatTemplate(model, OTHER_TEMPLATE)
        yield model


def text(tokens: object) -> str:
    """Join tokens."""
    return "".join(map(str, tokens))  # type: ignore[call-overload]


# --- who answers


def test_the_small_model_answers(tiny_gpt_oss: Model, gemma: Model) -> None:
    """Its tokens are those that it gives alone; the large one is not asked."""
    reply = Cascade(tiny_gpt_oss, gemma, never).stream(PROMPT, **GREEDY)
    tokens = list(reply)
    assert [token.token for token in tokens] == tiny_gpt_oss.generate(PROMPT, **GREEDY).tokens
    assert {(token.model, token.restarted) for token in tokens} == {("small", False)}
    assert reply.stats.answered_by == "small"
    assert reply.stats.reason == "never found nothing wrong"
    assert reply.stats.large is None
    assert reply.message == {"role": "assistant", "content": text(tokens)}
    assert "the small model answered: never" in str(reply.stats)


def test_the_large_model_answers(tiny_gpt_oss: Model, gemma: Model) -> None:
    """Only its tokens come out, and what the small one said is kept."""
    reply = Cascade(tiny_gpt_oss, gemma, always).stream(PROMPT, **GREEDY)
    tokens = list(reply)
    assert [token.token for token in tokens] == gemma.generate(PROMPT, **GREEDY).tokens
    assert {(token.model, token.restarted) for token in tokens} == {("large", False)}
    assert reply.draft is not None
    assert reply.draft.text == tiny_gpt_oss.generate(PROMPT, **GREEDY).text != text(tokens)
    assert reply.message["content"] == text(tokens)
    stats = reply.stats
    assert (stats.answered_by, stats.reason) == ("large", "always asked for it")
    assert stats.large is not None
    assert (stats.small.tokens, stats.large.tokens) == (24, 24)
    assert stats.small.stop_reason is stats.large.stop_reason is StopReason.MAX_TOKENS
    assert str(stats).count("\n") == 2


def test_nothing_comes_out_before_it_is_judged(tiny_gpt_oss: Model, gemma: Model) -> None:
    """Unless the draft is to be seen: then the first token of the large model says that the answer starts anew."""
    tokens: list[overspill.CascadeToken] = []
    n_shown: list[int] = []
    for answer in (True, False):

        def judge(draft: Draft, answer: bool = answer) -> bool:
            n_shown.append(len(tokens))
            return answer

        for show_draft in (False, True):
            tokens.clear()
            for token in Cascade(tiny_gpt_oss, gemma, judge).stream(PROMPT, show_draft=show_draft, **GREEDY):
                tokens.append(token)
            assert n_shown.pop() == (24 if show_draft else 0)
            names = [token.model for token in tokens]
            if not show_draft:
                assert names == ["large" if answer else "small"] * 24
            else:
                assert names == ["small"] * 24 + ["large"] * (24 if answer else 0)
            starts = [i for i, token in enumerate(tokens) if token.restarted]
            assert starts == ([24] if show_draft and answer else [])


def test_chat(smollm2: Model, other: Model) -> None:
    """Conversations go to both, each in its own words; tokens know their channel, replies are messages."""
    # Twice: of a prompt that was read before, only the last token is computed again, which may round otherwise.
    for _ in range(2):
        expected = {model: text(model.chat(QUESTION, **GREEDY)) for model in (smollm2, other)}
    assert expected[smollm2] != expected[other]
    messages = [{"role": "user", "content": QUESTION}]
    for escalate, answering in ((never, smollm2), (always, other)):
        with Cascade(smollm2, other, escalate).chat(messages, **GREEDY) as reply:
            tokens = list(reply)
        assert text(tokens) == expected[answering]
        assert {token.channel for token in tokens} == {overspill.Channel.FINAL}
        assert reply.message == {"role": "assistant", "content": expected[answering]}
        assert reply.draft is not None
        assert reply.draft.message == {"role": "assistant", "content": expected[smollm2]}


# --- why


def rows(model: Model, prompt: list[int], reply: list[int]) -> NDArray[np.float64]:
    """Return the log-probabilities that each token of a reply was drawn from, in double precision."""
    model.reset()
    logits = model.eval(prompt).astype(np.float64)
    found = []
    for token in reply:
        shifted = logits - logits.max()
        found.append(shifted - np.log(np.exp(shifted).sum()))
        logits = model.eval([token]).astype(np.float64)
    model.reset()
    return np.array(found)


def test_signals_are_what_they_say(gemma: Model, tiny_gpt_oss: Model) -> None:
    """Mean log-probability and mean entropy agree with double precision, and decide at their bounds."""
    options: dict[str, Any] = {"temperature": 1.3, "seed": 7, "max_tokens": 30}
    reply = Cascade(gemma, tiny_gpt_oss, [mean_logprob(below=-1e9), mean_entropy(above=1e9)]).stream(PROMPT, **options)
    ids = [token.id for token in reply]
    assert ids == [token.id for token in gemma.generate(PROMPT, **options).tokens], "measuring changed the draws"
    assert reply.draft is not None
    assert not any(map(gemma.is_end_of_generation, ids))
    expected = rows(gemma, gemma.tokenize(PROMPT), ids)
    logprobs = expected[np.arange(len(ids)), ids]
    entropies = -(np.exp(expected) * expected).sum(axis=1)
    assert np.allclose(reply.draft.logprobs, logprobs, atol=1e-4)
    assert np.allclose(reply.draft.entropies, entropies, atol=1e-4)
    assert f"{logprobs.mean():.2f}"[:4] in reply.stats.reason
    assert f"{entropies.mean():.2f}"[:4] in reply.stats.reason
    assert "over 30 tokens is not below -1e+09 nats" in reply.stats.reason
    low, high = float(np.mean(reply.draft.logprobs)), float(np.mean(reply.draft.entropies))
    for signal, escalates in (
        (mean_logprob(below=low + 1e-6), True),
        (mean_logprob(below=low - 1e-6), False),
        (mean_entropy(above=high - 1e-6), True),
        (mean_entropy(above=high + 1e-6), False),
    ):
        assert signal(reply.draft).escalate is escalates


def test_entropy_of_known_distributions(tiny_gpt_oss: Model, gemma: Model) -> None:
    """A choice between k equal tokens has ln k, certainty has none; forbidden tokens count for nothing."""
    for n_equal, largest, others in ((tiny_gpt_oss.n_vocab, 3, 3), (8, -50, -np.inf), (1, 1000, 0)):

        def edit(
            logits: NDArray[np.float32],
            tokens: NDArray[np.int32],
            n: int = n_equal,
            values: tuple[float, float] = (largest, others),
        ) -> None:
            logits[:n], logits[n:] = values

        expected = math.log(n_equal)
        cascade = Cascade(tiny_gpt_oss, gemma, mean_entropy(above=1e9))
        reply = cascade.stream(PROMPT, logits_processors=[edit], max_tokens=3, sampler=lambda logits, tokens: 7)
        list(reply)
        assert reply.draft is not None
        assert reply.draft.entropies
        assert np.allclose(reply.draft.entropies, expected, atol=1e-4)


def written(model: Model, reply: str) -> Callable[[NDArray[np.float32], NDArray[np.int32]], int]:
    """Return a sampler that makes a model write ``reply``, and end."""
    tokens = [*model.tokenize(reply, add_special=False), model.special_tokens["eos"]]
    script = iter(tokens)
    return lambda logits, tokens: next(script)


def test_only_the_answer_counts(smollm2_path: Path, other: Model, vocabularies: Path) -> None:
    """Neither reasoning nor marks nor the end: the tokens of the answer, those without a whole character too."""
    template = (vocabularies / "templates" / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    answer = "東京です。Of course."
    with Model(smollm2_path, n_ctx=1024, n_threads=2) as model:
        model.chat_template = ChatTemplate(model, template)
        sampler = written(model, f"<think>\nThe capital, 東京?\n</think>\n\n{answer}")
        reply = Cascade(model, other, [mean_logprob(below=-1e9), mean_entropy(above=1e9)]).chat(
            QUESTION, sampler=sampler
        )
        tokens = list(reply)
        assert reply.message["content"] == answer
        assert "capital" in reply.message["reasoning_content"]
        assert reply.draft is not None
        ids = [token.id for token in tokens]
        answer_ids = model.tokenize(answer, add_special=False)
        # The first character is spread over two tokens; that the first of them belongs to it shows only later.
        counted = reply.draft.logprobs
        assert len(counted) == len(reply.draft.entropies) == len(answer_ids) - 1
        begin = next(i for i in range(len(ids)) if ids[i : i + len(answer_ids)] == answer_ids) + 1
        assert counted == tuple(token.logprob for token in tokens[begin : begin + len(counted)])


def test_a_reply_without_an_answer_escalates(smollm2_path: Path, other: Model, vocabularies: Path) -> None:
    """There is no mean of nothing; the reason is how the reply ended."""
    template = (vocabularies / "templates" / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    with Model(smollm2_path, n_ctx=1024, n_threads=2) as model:
        model.chat_template = ChatTemplate(model, template)
        sampler = written(model, "<think>\nLet me see, and see again")
        reply = Cascade(model, other, mean_logprob(below=-1e9)).chat(QUESTION, sampler=sampler, max_tokens=6)
        assert next(reply).model == "large"
        reply.close()
    assert reply.stats.reason == "there is no answer, the reply ended with max_tokens"


def test_what_a_predicate_may_answer(tiny_gpt_oss: Model, gemma: Model) -> None:
    """A truth, a reason, or both; of several the first that asks for it."""

    def says_no(draft: Draft) -> str:
        return "it says no" if "no" in draft.text else ""

    def too_long(draft: Draft) -> Judgement:
        return Judgement(draft.stats.tokens > 3, f"{draft.stats.tokens} tokens")

    def answered(*escalations: Escalation, **options: Any) -> tuple[str | None, str]:
        reply = Cascade(gemma, tiny_gpt_oss, escalations).stream(PROMPT, temperature=0, **options)
        list(reply)
        return reply.stats.answered_by, reply.stats.reason

    assert answered(says_no, max_tokens=2) == ("small", "says_no found nothing wrong")
    assert answered(lambda draft: "because", max_tokens=2) == ("large", "because")
    assert answered(says_no, too_long, max_tokens=2) == ("small", "says_no found nothing wrong; 2 tokens")
    assert answered(says_no, too_long, always, max_tokens=4) == ("large", "4 tokens")
    assert answered(lambda draft: np.bool_(True), max_tokens=1)[0] == "large"
    assert answered(lambda draft: None, max_tokens=1)[0] == "small"


def test_the_default_is_the_mean_log_probability(gemma: Model, tiny_gpt_oss: Model) -> None:
    """Random weights are not sure of anything."""
    reply = Cascade(tiny_gpt_oss, gemma).stream(PROMPT, **GREEDY)
    list(reply)
    assert reply.stats.answered_by == "large"
    assert reply.stats.reason.startswith("mean log-probability -")
    assert reply.stats.reason.endswith("nats over 24 tokens is below -1 nats")


# --- mistakes, and the end


def test_mistakes(tiny_gpt_oss: Model, gemma: Model) -> None:
    """Each is named, before anything is decoded."""
    for wrong in ("mean_logprob", 3, [], [mean_logprob(), 1.0]):
        with pytest.raises(TypeError, match="escalate must be a function of a draft"):
            Cascade(tiny_gpt_oss, gemma, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="below must be a finite number of nats"):
        mean_logprob(below=math.nan)
    with pytest.raises(TypeError, match="above must be a number"):
        mean_entropy(above="2")  # type: ignore[arg-type]
    cascade = Cascade(tiny_gpt_oss, gemma, never)
    with pytest.raises(TypeError, match="prompt must be a string, since token ids are one model's own"):
        cascade.stream([1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sampler must be a function here"):
        cascade.stream(PROMPT, sampler=overspill.Sampler())
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        cascade.stream(PROMPT, max_tokens=0)
    with pytest.raises(overspill.Error, match="has no chat template"):
        cascade.chat(QUESTION)


def test_exceptions_reach_the_caller(tiny_gpt_oss: Model, gemma: Model) -> None:
    """A predicate's own, which ends the stream."""
    problem = LookupError("the predicate's own")

    def fail(draft: Draft) -> bool:
        raise problem

    reply = Cascade(tiny_gpt_oss, gemma, fail).stream(PROMPT, **GREEDY)
    with pytest.raises(LookupError) as caught:
        list(reply)
    assert caught.value is problem
    assert list(reply) == []
    assert reply.stats.answered_by is None


@pytest.mark.parametrize("way", ["break", "close", "with", "del"])
@pytest.mark.parametrize("where", ["small", "large"])
def test_an_abandoned_stream_ends(tiny_gpt_oss: Model, gemma: Model, way: str, where: str) -> None:
    """In the draft or in the answer; the models are usable afterwards."""
    reply = Cascade(tiny_gpt_oss, gemma, always).stream(
        PROMPT, show_draft=where == "small", temperature=0, max_tokens=90
    )
    if way == "break":
        for _ in reply:
            break
    elif way == "close":
        next(reply)
        reply.close()
        reply.close()
    elif way == "with":
        with reply:
            next(reply)
    if way == "del":
        assert next(reply).model == where
        del reply
        gc.collect()
    else:
        assert list(reply) == []
        stats = reply.stats
        latest = stats.small if where == "small" else stats.large
        assert latest is not None
        assert latest.stop_reason is StopReason.CLOSED
        assert latest.tokens == 1
        assert stats.answered_by == (None if where == "small" else "large")
    for model in (tiny_gpt_oss, gemma):
        assert model.generate(PROMPT, **GREEDY).stats.tokens == 24


def test_closing_from_another_thread(gemma_path: Path, tiny_gpt_oss: Model) -> None:
    """It ends the step that runs, and nothing is judged."""
    judged: list[Draft] = []
    with Model(gemma_path, n_ctx=8192, n_batch=4096, n_threads=2) as model:
        reply = Cascade(model, tiny_gpt_oss, lambda draft: judged.append(draft)).stream("word " * 4000)
        timer = threading.Timer(0.2, reply.close)
        timer.start()
        assert list(reply) == []
        timer.join()
    assert reply.stats.small.stop_reason is StopReason.CLOSED
    assert not judged


def test_closing_a_cascade(gemma_path: Path, smollm2: Model) -> None:
    """It ends its streams, closes what it has loaded, and nothing that was given."""
    with Cascade(gemma_path, smollm2, never, n_ctx=256, n_threads=2) as cascade:
        reply = cascade.stream(PROMPT)
        own = cascade.models["small"]
        assert repr(cascade) == f"<overspill.Cascade small: {gemma_path.name}, large: {smollm2.path.name}>"
    cascade.close()
    assert own.closed
    assert not smollm2.closed
    assert list(reply) == []
    with pytest.raises(overspill.ClosedError, match="the cascade is closed"):
        cascade.stream(PROMPT)


# --- which models are in memory


def test_both_fit(gemma_path: Path, smollm2_path: Path) -> None:
    """Two small files are loaded at once, and answer without loading."""
    with Cascade(gemma_path, smollm2_path, always, n_ctx=256, n_threads=2) as cascade:
        assert cascade.keeps_both
        assert cascade.budget.startswith("both models are in memory: they need ")
        assert set(cascade.models) == {"small", "large"}
        reply = cascade.stream(PROMPT, **GREEDY)
        assert text(reply)
        assert reply.stats.loading_s == 0


@pytest.mark.slow
def test_one_at_a_time(gemma_path: Path, smollm2_path: Path, gemma: Model, smollm2: Model) -> None:
    """With memory for one, the large model is loaded at need, and the small one for the next question."""
    memory = {"cpu": "330MiB"}
    with Cascade(gemma_path, smollm2_path, always, memory=memory, n_ctx=256, n_threads=2) as cascade:
        assert not cascade.keeps_both
        assert cascade.budget.startswith(
            "one model at a time: the large one does not fit beside the small one: RAM has "
        )
        for _ in range(2):
            reply = cascade.stream(PROMPT, **GREEDY)
            assert list(cascade.models) == ["small"]
            small = cascade.models["small"]
            tokens = list(reply)
            assert text(tokens) == smollm2.generate(PROMPT, **GREEDY).text
            assert reply.draft is not None
            assert reply.draft.text == gemma.generate(PROMPT, **GREEDY).text
            assert small.closed
            assert list(cascade.models) == ["large"]
            assert reply.stats.loading_s > 0
            assert "loading: " in str(reply.stats)
        first = cascade.stream(PROMPT)  # which needs the small model
        assert next(cascade.stream(PROMPT, show_draft=True)).model == "small"
        second = cascade.stream(PROMPT, **GREEDY)
        with pytest.raises(overspill.Error, match="another stream still needs the small one: end or close it first"):
            list(second)
        first.close()
        assert text(cascade.stream(PROMPT, **GREEDY)) == smollm2.generate(PROMPT, **GREEDY).text


@pytest.mark.slow
def test_closing_while_a_model_loads(gemma_path: Path, smollm2_path: Path) -> None:
    """Loading is cancelled, and the stream ends without an exception."""
    loads = itertools.count()

    def progress(share: float) -> None:
        if loading and share > 0:
            next(loads)
            reply.close()

    loading = False
    memory = {"cpu": "330MiB"}
    with Cascade(gemma_path, smollm2_path, always, memory=memory, n_ctx=256, progress=progress) as cascade:
        reply = cascade.stream(PROMPT, **GREEDY)
        loading = True
        assert list(reply) == []
        loading = False
        assert next(loads) > 0, "it was not loaded: the test has tested nothing"
        assert not cascade.models
        assert reply.stats.answered_by is None
        assert reply.draft is not None
        assert text(cascade.stream(PROMPT, **GREEDY))


def test_forecasts_of_gpt_oss(header_path: Callable[[str], Path]) -> None:
    """20b and 120b together want about 75 GB: with 128 GiB of RAM there is room beside a GPU of 24 GiB, with 48 not."""
    small, large = (ModelInfo.from_file(header_path(name)) for name in ("gpt-oss-20b", "gpt-oss-120b"))
    roomy = overspill.Hardware.given(ram="128GiB", vram="24GiB")
    both, reason = fit_together(small, large, roomy, {"n_ctx": 8192})
    assert both
    assert "GPU0" in reason
    assert "RAM" in reason
    tight = overspill.Hardware.given(ram="48GiB", vram="24GiB")
    both, reason = fit_together(small, large, tight, {"n_ctx": 8192})
    assert not both
    assert reason.startswith("one model at a time: the large one does not fit")
    # On the CPU alone the GPU's memory does not help.
    middle = overspill.Hardware.given(ram="70GiB", vram="24GiB")
    assert fit_together(small, large, middle, {"n_ctx": 8192})[0]
    assert not fit_together(small, large, middle, {"n_ctx": 8192, "offload": "cpu"})[0]


def test_a_missing_file_is_named_at_once(gemma_path: Path, tmp_path: Path) -> None:
    """Not at first need, which may be days later."""
    with pytest.raises(overspill.ModelLoadError, match=r"missing\.gguf: no such file"):
        Cascade(gemma_path, tmp_path / "missing.gguf")
