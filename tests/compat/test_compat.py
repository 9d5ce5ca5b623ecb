"""Programs for llama-cpp-python: its calls give its answers, which OpenAI's own types accept."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from client_tasks import WEATHER
from model_fixtures import N_THREADS
from overspill import Error, Model
from overspill.compat import Llama, LlamaGrammar, LogitsProcessorList, StoppingCriteriaList
from rounding import NATS

QUESTION: list[Any] = [{"role": "user", "content": "Name three colours of the rainbow."}]
COUNT = LlamaGrammar.from_string('root ::= "one two three four five"')


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[Llama]:
    """Return SmolLM2 as a program for llama-cpp-python loads it."""
    with Llama(model_path=str(smollm2_path), n_ctx=512, n_threads=N_THREADS, verbose=False) as made:
        yield made


@pytest.fixture(scope="module")
def measured(smollm2_path: Path) -> Iterator[Llama]:
    """Return SmolLM2 with the logits after every token."""
    with Llama(str(smollm2_path), n_ctx=128, n_threads=N_THREADS, logits_all=True) as made:
        yield made


def whole(answer: Any) -> Any:
    """Return an answer that is not streamed."""
    assert isinstance(answer, dict)
    json.dumps(answer)
    return answer


def test_a_completion_is_the_models(llm: Llama, smollm2: Model) -> None:
    """Greedy, each token is the likeliest one, or about as likely, given those before it; so are the numbers."""
    answer = whole(llm("The capital of France is", max_tokens=8, temperature=0.0, logprobs=2))
    completion = Completion.model_validate(answer, strict=False)
    assert (completion.object, completion.model) == ("text_completion", llm.model_path)
    (choice,) = completion.choices
    assert choice.finish_reason == "length"
    prompt = smollm2.tokenize("The capital of France is")
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(prompt), 8)
    assert choice.logprobs is not None
    tokens, values = choice.logprobs.tokens or [], choice.logprobs.token_logprobs or []
    assert "".join(tokens) == choice.text
    smollm2.reset()
    logits = smollm2.eval(prompt)
    for i, token in enumerate(tokens):
        (chosen,) = smollm2.tokenize(token, add_special=False)
        assert logits[chosen] > logits.max() - NATS
        assert abs(values[i] - Llama.logits_to_logprobs(logits)[chosen]) < NATS
        assert (choice.logprobs.top_logprobs or [])[i][token] == pytest.approx(values[i], abs=1e-4)
        assert answer["choices"][0]["text"][(choice.logprobs.text_offset or [])[i] :].startswith(token)
        logits = smollm2.eval([chosen])


@pytest.mark.parametrize("prompt", ["Count: ", [504, 3575]])
@pytest.mark.parametrize("echo", [False, True])
def test_streamed_completions_are_whole_ones(llm: Llama, prompt: Any, echo: bool) -> None:
    """With a grammar for one text alone, pieces together are that text, and the prompt before it if it is wanted."""
    text = whole(llm.create_completion(prompt, max_tokens=None, grammar=COUNT, echo=echo))["choices"][0]["text"]
    before = prompt if isinstance(prompt, str) else llm.detokenize(prompt).decode()
    assert text == (before if echo else "") + "one two three four five"
    chunks: Any = list(llm.create_completion(prompt, max_tokens=0, grammar=COUNT, echo=echo, stream=True))
    for chunk in chunks:
        Completion.model_validate(chunk | {"choices": [one | {"finish_reason": "stop"} for one in chunk["choices"]]})
    assert len(chunks) > 3
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_chat_is_as_openai_has_it(llm: Llama) -> None:
    """Whole and streamed, as dictionaries and as objects of the package openai."""
    options: Any = {"max_tokens": 12, "temperature": 0.0, "logprobs": True, "top_logprobs": 3}
    answer = ChatCompletion.model_validate(whole(llm.create_chat_completion(QUESTION, **options)))
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(token.token for token in content) == choice.message.content
    assert [len(token.top_logprobs) for token in content] == [3] * 12
    assert all(token.logprob > token.top_logprobs[0].logprob - NATS for token in content)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(llm.model.chat_template.prepare(QUESTION).tokens)
    chunks = list(llm.create_chat_completion(QUESTION, grammar=COUNT, stream=True))
    streamed = [ChatCompletionChunk.model_validate(chunk).choices[0] for chunk in chunks]
    assert streamed[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in streamed) == "one two three four five"
    assert streamed[-1].finish_reason == "stop"
    objects = list(llm.create_chat_completion_openai_v1(QUESTION, grammar=COUNT, stream=True))
    assert {type(chunk) for chunk in objects} == {ChatCompletionChunk}
    assert type(llm.create_chat_completion_openai_v1(QUESTION, grammar=COUNT)) is ChatCompletion


def test_stops(llm: Llama) -> None:
    """Stop strings, one or several, and criteria end a reply, which does not have them."""
    for stop in (" three", [" four", " three"]):
        for streamed in (False, True):
            given: Any = llm("Count: ", grammar=COUNT, stop=stop, max_tokens=20, stream=streamed)
            parts = given if streamed else [given]
            choices = [part["choices"][0] for part in parts]
            assert "".join(choice["text"] for choice in choices) == "one two"
            assert choices[-1]["finish_reason"] == "stop"
    prompt = llm.tokenize(b"Count: ")
    seen = []

    def has_two_more(input_ids: Any, logits: Any) -> bool:
        seen.append((input_ids.tolist(), logits.shape))
        return len(input_ids) >= len(prompt) + 2

    ended = whole(llm(prompt, max_tokens=9, stopping_criteria=StoppingCriteriaList([has_two_more])))["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert [len(ids) - len(prompt) for ids, _ in seen] == [0, 1, 2]
    assert seen[0] == (prompt, (llm.n_vocab(),))
    assert ended["text"].encode() == llm.detokenize(seen[2][0][len(prompt) :])
    assert len(list(llm.generate(prompt, stopping_criteria=[has_two_more]))) == 2


def test_json_that_fits(llm: Llama) -> None:
    """By a response format of either form, and by a grammar of a schema."""
    schema = {"type": "object", "properties": {"n": {"enum": [7, 8]}}, "required": ["n"], "additionalProperties": False}
    formats: list[Any] = [
        {"response_format": {"type": "json_object", "schema": schema}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
        {"grammar": LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)},
    ]
    for options in formats:
        answer = whole(llm.create_chat_completion(QUESTION, max_tokens=60, **options))
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), schema)
    free = whole(llm.create_chat_completion(QUESTION, max_tokens=3, response_format={"type": "text"}))
    assert free["choices"][0]["message"]["content"][:1] not in "{["


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_tool_calls(tool_user: Path, older: bool, streamed: bool) -> None:
    """A tool that has to be called is, with arguments that fit; in the older form, where that has it."""
    asked: Any = {"tools": [{"type": "function", "function": WEATHER}]}
    asked["tool_choice"] = {"type": "function", "function": {"name": "get_weather"}}
    if older:
        asked = {"functions": [WEATHER], "function_call": {"name": "get_weather"}}
    question: Any = [{"role": "user", "content": "Will it rain in Rome in the next 2 days?"}]
    with Llama(str(tool_user), n_ctx=1024, n_threads=N_THREADS) as llm:
        answer: Any = llm.create_chat_completion(question, max_tokens=300, stream=streamed, **asked)
        choices = [part["choices"][0] for part in (answer if streamed else [answer])]
    assert choices[-1]["finish_reason"] == "tool_calls"
    (part,) = [one for one in (choice.get("message") or choice["delta"] for choice in choices) if "tool_calls" in one]
    (call,) = part["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["parameters"])
    assert part.get("function_call") == (call["function"] if older else None)


def test_logits_processors_and_biases(llm: Llama) -> None:
    """What functions return is what is sampled from, and biases are added, whatever the type of their keys."""
    (yes,) = llm.tokenize(b" yes", add_bos=False)

    def always(input_ids: Any, scores: Any) -> Any:
        assert input_ids.dtype == np.int32
        forced = np.full_like(scores, -np.inf)
        forced[yes] = scores[yes]
        return forced

    processors = LogitsProcessorList([lambda input_ids, scores: scores, always])
    assert whole(llm("Is it?", max_tokens=3, logits_processor=processors))["choices"][0]["text"] == " yes yes yes"
    for key in (yes, str(yes)):
        biased: Any = {key: 1000.0}
        assert whole(llm("Is it?", max_tokens=2, logit_bias=biased))["choices"][0]["text"] == " yes yes"


def test_seeds(smollm2_path: Path) -> None:
    """The model's seed decides the order of draws, and a call's that call."""

    def texts(seeds: list[int | None], **options: Any) -> list[str]:
        with Llama(str(smollm2_path), n_ctx=128, n_threads=N_THREADS, **options) as llm:
            prompt = llm.tokenize(b"Once upon a time")
            flat: Any = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 6}
            return [whole(llm(prompt, seed=seed, **flat))["choices"][0]["text"] for seed in seeds]

    first = texts([None, None, 3, 3], seed=11)
    assert first == texts([None, None, 3, 3], seed=11)
    assert first[0] != first[1]
    assert first[2] == first[3]
    assert texts([None], seed=12)[0] != first[0]
    assert len(set(texts([None, None, -1, -1]))) == 4


def test_tokens(llm: Llama, gemma_path: Path, smollm2: Model) -> None:
    """Bytes there and back; the special tokens, and the beginning-of-sequence token where the model has one."""
    text = "Grüße, 日本!\n"
    assert llm.detokenize(llm.tokenize(text.encode())).decode() == text
    assert llm.tokenize(b"<|im_end|>", special=True) == [2]
    assert len(llm.tokenize(b"<|im_end|>")) > 1
    assert llm.detokenize([2], special=True) == b"<|im_end|>"
    assert llm.detokenize([2]) == b""
    pieces = llm.tokenize("日".encode())
    assert b"".join(llm.detokenize([piece]) for piece in pieces) == "日".encode()
    assert (llm.token_bos(), llm.token_eos(), llm.token_nl()) == (1, 2, llm.tokenize(b"\n")[0])
    assert (llm.n_ctx(), llm.n_vocab(), llm.n_embd()) == (512, smollm2.n_vocab, 576)
    assert llm.metadata["general.architecture"] == "llama"
    assert llm.metadata["tokenizer.ggml.add_bos_token"] == "false"
    with Llama(str(gemma_path), vocab_only=True) as gemma:
        assert gemma.tokenize(b"Hello")[0] == gemma.token_bos() == 2
        assert gemma.token_bos() not in gemma.tokenize(b"Hello", add_bos=False)
        assert gemma.detokenize(gemma.tokenize(b"Hello")) == b"Hello"


def test_the_loop_by_hand(llm: Llama, measured: Llama) -> None:
    """Logits after each token are those of eval, one row or all; what is sampled from them is what a stream gives."""
    tokens = measured.tokenize(b"The capital of France is")
    measured.reset()
    measured.eval(tokens[:2])
    measured.eval(tokens[2:])
    assert measured.n_tokens == len(tokens)
    assert list(measured.eval_tokens) == tokens
    assert measured.scores.shape == (128, measured.n_vocab())
    llm.reset()
    llm.eval(tokens)
    assert llm.scores.shape == (1, llm.n_vocab())
    assert not llm.scores.flags.owndata
    assert np.abs(llm.scores[-1] - measured.scores[len(tokens) - 1]).max() < NATS
    assert len(measured.eval_logits) == len(tokens)
    assert len(llm.eval_logits) == 1
    assert llm.detokenize([llm.sample(temp=0.0)]) == b" Paris"
    assert measured.sample(temp=0.0, idx=0) == int(measured.scores[0].argmax())
    llm.reset()
    assert (llm.n_tokens, len(llm.eval_logits)) == (0, 0)
    with pytest.raises(Error, match="eval"):
        llm.sample()


def test_generate_takes_tokens(llm: Llama) -> None:
    """They stand behind the last one, as in a prompt that has them all; the tokens of eval come before if asked."""
    prompt, more = llm.tokenize(b"The capital of France is"), llm.tokenize(b" In one word, the capital of Italy is")
    generated = llm.generate(prompt, temp=0.0)
    first = next(generated)
    second = generated.send(more)
    assert second == next(llm.generate([*prompt, first, *more], temp=0.0))
    assert second != next(llm.generate([*prompt, first], temp=0.0))
    llm.reset()
    llm.eval(prompt)
    assert next(llm.generate([first, *more], temp=0.0, reset=False)) == second
    llm.reset()
    ended = list(llm.generate(llm.tokenize(b"<|im_start|>assistant\nHi", special=True), grammar=COUNT))
    assert llm.model.is_end_of_generation(ended[-1])
    assert llm.detokenize(ended) == b"one two three four five"


PROGRAMS: dict[str, tuple[str, str]] = {
    "a completion": (
        """
        from llama_cpp import Llama

        llm = Llama(model_path=PATH, n_gpu_layers=-1, seed=1337, n_ctx=256, verbose=False)
        output = llm(
            "Q: Which planets are in the solar system? A: ", max_tokens=24, stop=["Q:", "\\n"], echo=True
        )
        print(output["choices"][0]["text"], output["usage"]["total_tokens"])
        llm.close()
        """,
        r"Q: Which planets are in the solar system\? A: .*\d+\n",
    ),
    "a streamed chat": (
        """
        from llama_cpp import Llama

        llm = Llama(PATH, chat_format="chatml", n_ctx=256)
        stream = llm.create_chat_completion(
            messages=[
                {"role": "system", "content": "You answer briefly."},
                {"role": "user", "content": "Describe a cat."},
            ],
            max_tokens=10,
            stream=True,
        )
        for chunk in stream:
            delta = chunk["choices"][0]["delta"]
            if "role" in delta:
                print(delta["role"], end=": ")
            elif "content" in delta:
                print(delta["content"], end="")
        print(chunk["choices"][0]["finish_reason"])
        """,
        r"assistant: .+(stop|length)\n",
    ),
    "a loop over tokens": (
        """
        from llama_cpp import Llama, LogitsProcessorList, StoppingCriteriaList

        llm = Llama(model_path=PATH, n_ctx=256, n_threads=2, logits_all=True)
        tokens = llm.tokenize(b"Hello, world")
        enough = StoppingCriteriaList([lambda ids, logits: len(ids) > len(tokens) + 5])
        same = LogitsProcessorList([lambda ids, scores: scores])
        found = []
        for token in llm.generate(tokens, top_k=40, top_p=0.95, temp=1.0, repeat_penalty=1.1,
                                  stopping_criteria=enough, logits_processor=same):
            found.append(token)
        print(len(found), len(llm.detokenize(found)) > 0)
        llm.reset()
        llm.eval(tokens)
        print(llm._scores.shape[0] == llm.n_tokens == len(tokens), llm.sample(temp=0) == llm._scores[-1].argmax())
        """,
        r"6 True\nTrue True\n",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run_with_another_import(smollm2_path: Path, name: str) -> None:
    """Nothing but the name of the module is changed."""
    text, printed = PROGRAMS[name]
    lines = [line.removeprefix(" " * 8) for line in text.replace("llama_cpp", "overspill.compat").splitlines()]
    out = io.StringIO()
    with redirect_stdout(out):
        exec("\n".join(lines), {"PATH": str(smollm2_path)})
    assert re.fullmatch(printed, out.getvalue(), re.DOTALL), out.getvalue()


def test_a_model_of_the_hub(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is in the hub's cache is found by its file, by a pattern, and by its repository alone."""
    snapshot = tmp_path / "models--owner--smol-GGUF" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "smol.Q4_1.gguf").symlink_to(smollm2_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for filename in ("smol.Q4_1.gguf", "*q4_1.gguf", None):
        with Llama.from_pretrained(repo_id="owner/smol-GGUF", filename=filename, vocab_only=True) as llm:
            assert llm.n_vocab() == 49152


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm("word " * 600), r"prompt: requested tokens \(\d+\) exceed context window of 512.*n_ctx"),
        (lambda llm: llm.create_chat_completion([{"role": "user", "content": "word " * 600}]), "exceed context window"),
        (lambda llm: llm("a", suffix="b"), "suffix must be None"),
        (lambda llm: llm("a", tfs_z=0.9), "tfs_z must be 1.0"),
        (lambda llm: llm("a", mirostat_mode=1), "mirostat_mode must be 0 or 2"),
        (lambda llm: llm("a", logprobs=1, echo=True), "echo must be False"),
        (lambda llm: llm("a", grammar="root ::= [a-z]"), "grammar must be a LlamaGrammar"),
        (lambda llm: llm("a", logits_processor=len), "logits_processor"),
        (lambda llm: llm("a", stopping_criteria=[3]), r"stopping_criteria\[0\]"),
        (lambda llm: llm(b"a"), "prompt must be a string or token ids, not bytes"),
        (lambda llm: llm.tokenize("a"), "text must be bytes"),
        (lambda llm: llm.tokenize(b"\xff"), "text must be UTF-8"),
        (lambda llm: llm.generate([1], penalize_nl=False), "penalize_nl must be True"),
        (lambda llm: llm.create_chat_completion(QUESTION, tool_choice={"name": "f"}), "tool_choice: there is no tool"),
        (lambda llm: llm.create_chat_completion(QUESTION, response_format={"type": "xml"}), "response_format must be"),
        (lambda llm: llm.create_chat_completion(QUESTION, functions=[3]), "functions: tools"),
        (lambda llm: llm.create_chat_completion_openai_v1(QUESTION, max_token=3), "did you mean 'max_tokens'"),
        (lambda llm: LlamaGrammar.from_file("none/such"), "file: 'none/such' cannot be read"),
        (lambda llm: Llama.from_pretrained("owner/name", "*.gguf"), "filename must be a whole name"),
        (lambda llm: llm.from_pretrained("owner/name", None, cache_dir="x"), "cache_dir must be None.*HF_HOME"),
        (lambda llm: Llama.from_pretrained("owner/name", "a.gguf", n_cxt=5), "did you mean 'n_ctx'"),
    ],
)
def test_what_is_not_taken_says_so(llm: Llama, call: Callable[[Llama], object], words: str) -> None:
    """By the name of the argument, in one line, and before anything is computed."""
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        call(llm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["embed", "create_embedding", "save_state", "load_state", "pooling_type", "ctx"])
def test_methods_that_are_absent_say_so(llm: Llama, name: str) -> None:
    """They are no attributes, and the error says what there is instead."""
    assert not hasattr(llm, name)
    with pytest.raises(AttributeError, match=f"'{name}' here: \\w+"):
        getattr(llm, name)
