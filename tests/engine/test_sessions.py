"""States in files: streams that go on where others have ended, and files that do not fit or are damaged."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

import overspill.engine.session
from architectures import N_VOCAB, WIDTH, tiny
from commands import overspill as command
from header_files import Header, write_random_model
from model_fixtures import N_THREADS
from overspill import Chat, ContextFullError, Error, Model, StopReason, Stream
from programs import in_process
from rounding import is_same

pytestmark = pytest.mark.usefixtures("no_gpu")

TEXT = "The quick brown fox jumps over the lazy dog. "
GREEDY: dict[str, Any] = {"temperature": 0}


def mamba() -> Header:
    """Return a tiny Mamba, all of whose layers are recurrent."""
    inner, states, rank, kernel = 2 * WIDTH, 16, 16, 4
    layer: dict[str, tuple[tuple[int, ...], Type]] = {
        "attn_norm.weight": ((WIDTH,), Type.F32),
        "ssm_in.weight": ((2 * inner, WIDTH), Type.F32),
        "ssm_conv1d.weight": ((inner, kernel), Type.F32),
        "ssm_conv1d.bias": ((inner,), Type.F32),
        "ssm_x.weight": ((rank + 2 * states, inner), Type.F32),
        "ssm_dt.weight": ((inner, rank), Type.F32),
        "ssm_dt.bias": ((inner,), Type.F32),
        "ssm_a": ((inner, states), Type.F32),
        "ssm_d": ((inner,), Type.F32),
        "ssm_out.weight": ((WIDTH, inner), Type.F32),
    }
    keys = {
        **{"context_length": 512, "embedding_length": WIDTH, "block_count": 2, "feed_forward_length": 0},
        **{"attention.head_count": 0, "attention.layer_norm_rms_epsilon": 1e-5},
        **{"ssm.conv_kernel": kernel, "ssm.inner_size": inner, "ssm.state_size": states, "ssm.time_step_rank": rank},
    }
    tensors = {"token_embd.weight": ((N_VOCAB, WIDTH), Type.F32), "output_norm.weight": ((WIDTH,), Type.F32)}
    for number in range(2):
        tensors |= {f"blk.{number}.{name}": value for name, value in layer.items()}
    return Header("mamba", N_VOCAB, keys, tensors)


# Dense, with windows, a mixture, latent attention without values, layers of convolutions, and recurrent ones alone.
KINDS = ("smollm2", "gemma", "tiny_gpt_oss", "gemma2", "deepseek2", "lfm2moe", "mamba")


@pytest.fixture(scope="module")
def path_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a kind to the file of such a model."""
    folder = tmp_path_factory.mktemp("models")

    def path(kind: str) -> Path:
        if kind in ("smollm2", "gemma", "tiny_gpt_oss"):
            found: Path = request.getfixturevalue(f"{kind}_path")
            return found
        file = folder / f"{kind}.gguf"
        if not file.exists():
            write_random_model(file, mamba() if kind == "mamba" else tiny(kind), vocabulary=False)
        return file

    return path


@pytest.fixture(scope="module")
def model(tiny_gpt_oss_path: Path) -> Iterator[Model]:
    """Return the tiny model."""
    with Model(tiny_gpt_oss_path, n_ctx=1024, n_threads=1) as loaded:
        yield loaded


def ids(model: Model, prompt: list[int], n: int, **options: Any) -> list[int]:
    """Return the most likely tokens after a prompt."""
    return [token.id for token in model.generate(prompt, max_tokens=n, **GREEDY, **options).tokens]


IN_ANOTHER_PROCESS = """
import json, sys
import overspill
file, session, settings, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
with overspill.Model(file, **settings) as model:
    reply = model.generate(prompt, max_tokens=64, temperature=0, session=session)
print(json.dumps([[token.id for token in reply.tokens], reply.stats.cached_tokens]))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_stream_goes_on(path_of: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """The next 64 tokens are those of a stream that did not stop: here, among other places, and in a new process."""
    file, session = path_of(kind), tmp_path / "session"
    # A number of threads that does not change: sums of attention are divided among them.
    settings: dict[str, Any] = {"n_ctx": 512, "n_threads": N_THREADS, "adapt_threads": False, "offload": "cpu"}
    if kind in ("tiny_gpt_oss", "gemma2"):
        # A window is restored to other cells; in half precision, sums over these would round otherwise.
        settings |= {"type_k": "f32", "type_v": "f32", "flash_attention": "off"}
    with Model(file, **settings) as model:
        prompt = [int(token) for token in np.random.default_rng(3).integers(3, 500, 300)]
        begun = ids(model, prompt, 16, session=session)
    with Model(file, **settings) as model:
        whole = ids(model, prompt, 80, reuse=True)  # which reads in the same batches
    assert whole[:16] == begun
    longer = prompt + begun
    kept = session.read_bytes()
    for n_parallel in (None, 3):
        session.write_bytes(kept)
        with Model(file, n_parallel=n_parallel, **settings) as model:
            reply = model.generate(longer, max_tokens=64, session=session, **GREEDY)
            assert [token.id for token in reply.tokens] == whole[16:]
            assert reply.stats.cached_tokens == len(longer) - 1
    # What the model with other places has written is read in a process that has one.
    last = longer + whole[16:]
    assert in_process(IN_ANOTHER_PROCESS, str(file), str(session), json.dumps(settings), json.dumps(last))[1] == 379
    session.write_bytes(kept)
    answer = in_process(IN_ANOTHER_PROCESS, str(file), str(session), json.dumps(settings), json.dumps(longer))
    assert answer == [whole[16:], len(longer) - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_common_is_reused(path_of: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """Prompts that part from the saved one: as much as the memory can go back, and the reply of a whole reading."""
    session = tmp_path / "session"
    prompt = [int(token) for token in np.random.default_rng(3).integers(3, 500, 300)]
    settings: dict[str, Any] = {"n_ctx": 512, "n_threads": N_THREADS, "offload": "cpu", "n_batch": 64}
    with Model(path_of(kind), **settings) as model:
        ids(model, prompt, 40, session=session)
    kept = session.read_bytes()
    for n_common in (339, 300, 290, 250, 3, 0):
        session.write_bytes(kept)
        with Model(path_of(kind), **settings) as model:
            state = model._states.read(session)
            saved = state.parts()[0].tolist()
            other = [*saved[:n_common], *([7, 8, 9] if n_common else [400, 401, 402])]
            reply = model.generate(other, max_tokens=4, session=session, **GREEDY, logprobs=5)
            cached = reply.stats.cached_tokens
            whole = model.generate(other, max_tokens=4, **GREEDY, logprobs=5)
        can_go_back = kind in ("smollm2", "deepseek2", "gemma")  # Gemma's window is of 512 tokens
        if n_common == 339 or can_go_back:
            assert cached == n_common
        else:  # back to what was remembered of the prompt's end
            assert cached == (284 if n_common >= 284 else 0)
        is_same(reply.tokens, whole.tokens)


def test_states_of_a_model(model: Model, tmp_path: Path) -> None:
    """Those of the stream that decoded last; a later stream that begins with it does not read it again."""
    file = tmp_path / "state"
    prompt = list(range(10, 210))
    reply = ids(model, prompt, 8)
    model.save_state(file)
    ids(model, list(range(300, 340)), 4)
    model.load_state(file)
    again = model.generate([*prompt, *reply], max_tokens=4, reuse=True, **GREEDY)
    assert again.stats.cached_tokens == 207
    with Model(model.path, n_ctx=64, n_threads=1) as fresh:
        with pytest.raises(Error, match="no state to save"):
            fresh.save_state(tmp_path / "nothing")
        with pytest.raises(ContextFullError, match=r"has 207 tokens, and the context holds 64"):
            fresh.load_state(file)
        with pytest.raises(Error, match="No such file"):
            fresh.load_state(tmp_path / "nothing")
        fresh.close()
        with pytest.raises(Error, match="closed"):
            fresh.save_state(file)
    with Model(model.path, vocab_only=True) as words, pytest.raises(Error, match="vocab_only"):
        words.load_state(file)
    with Model(model.path, n_ctx=256, n_threads=1, n_parallel=1) as busy, busy.stream([1, 2, 3]) as stream:
        next(stream)
        with pytest.raises(Error, match="every place for a stream is taken"):
            busy.load_state(file)


def test_saving_beside_streams(model: Model, tmp_path: Path) -> None:
    """Other threads decode meanwhile; what is saved is a whole prefix of one of them."""
    prompts = [list(range(10 * i, 10 * i + 60)) for i in range(1, 5)]
    stopping = threading.Event()

    def decode(prompt: list[int]) -> None:
        while not stopping.is_set():
            ids(model, prompt, 30)

    threads = [threading.Thread(target=decode, args=(prompt,)) for prompt in prompts[1:]]
    for thread in threads:
        thread.start()
    try:
        for i in range(6):
            reply = ids(model, prompts[0], 20, session=tmp_path / "session")
            model.save_state(tmp_path / f"state {i}")
            tokens = model._states.read(tmp_path / "session").parts()[0].tolist()
            assert tokens == [*prompts[0], *reply[:-1]]
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    for i in range(6):
        tokens = model._states.read(tmp_path / f"state {i}").parts()[0].tolist()
        assert any(tokens[:60] == prompt[: len(tokens)] for prompt in prompts)


def test_a_file_that_does_not_fit(
    model: Model, path_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what differs; the file is as it was, and nothing of the stream was begun."""
    file = tmp_path / "state"
    prompt = list(range(10, 60))
    ids(model, prompt, 8, session=file)
    kept = file.read_bytes()

    def check(other: Model, text: str) -> None:
        for use in (
            lambda: other.load_state(file),
            lambda: ids(other, prompt, 4, session=file),
            lambda: asyncio.run(_first(other, prompt, file)),
        ):
            with pytest.raises(Error, match=text) as caught:
                use()
            assert str(file) in str(caught.value) or "flash_attention" in text
            assert file.read_bytes() == kept

    settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "offload": "cpu"}
    # The same header, and one other weight.
    trained = tmp_path / "trained.gguf"
    content = bytearray(model.path.read_bytes())
    content[-1] ^= 1
    trained.write_bytes(content)
    for path in (trained, path_of("smollm2")):
        with Model(path, **settings) as other:
            check(other, "was saved with another model, .* Load that one")
    changed = {"gpt-oss.rope.freq_base": 50.0}
    with Model(model.path, overrides=changed, **settings) as other:
        check(other, "another model")
    with Model(model.path, type_k="q8_0", **settings) as other:
        check(other, 'was saved with type_k="f16", and the model is loaded with type_k="q8_0"')
    with Model(model.path, flash_attention="off", **settings) as other:
        check(other, "transposition; it needs the flash_attention")
    monkeypatch.setattr(overspill.engine.session, "LLAMA_CPP_COMMIT", "123456789")
    with Model(model.path, **settings) as other:
        check(other, "was saved with another version")
    monkeypatch.undo()
    copy = tmp_path / "renamed.gguf"
    shutil.copy(model.path, copy)
    with Model(copy, **settings) as same:
        assert same.generate([*prompt, 3], max_tokens=1, session=file).stats.cached_tokens == 50


async def _first(model: Model, prompt: list[int], file: Path) -> None:
    async with model.astream(prompt, session=file) as stream:
        await anext(stream)


def test_long_contexts_that_rotate_otherwise(tmp_path: Path) -> None:
    """A state of a context beyond the first length of such a model is not one for a shorter context."""
    header = tiny("phi3")
    tensors = dict(header.tensors)
    for name in ("rope_factors_long", "rope_factors_short"):
        tensors[f"{name}.weight"] = ((32,), Type.F32)
    keys = header.keys | {"rope.scaling.original_context_length": 256, "rope.dimension_count": 64}
    path = write_random_model(tmp_path / "model.gguf", Header("phi3", header.n_vocab, keys, tensors), vocabulary=False)
    file = tmp_path / "state"
    with Model(path, n_ctx=512, n_threads=1) as model:
        ids(model, [5, 6, 7] * 20, 4, session=file)
    with Model(path, n_ctx=256, n_threads=1) as model, pytest.raises(Error, match="needs the n_ctx"):
        model.load_state(file)
    with Model(path, n_ctx=300, n_threads=1) as model:
        model.load_state(file)


def damaged(content: bytes, random: Random) -> bytes:
    """Return a file that is not the same, in one of several ways."""
    at = random.randrange(len(content))
    n = random.choice((1, 2, 4, 64, 4096))
    other = content
    while other == content:
        match random.randrange(6):
            case 0:
                other = content[:at]
            case 1:
                other = content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
            case 2:
                other = content[:at] + random.randbytes(n) + content[at + n :]
            case 3:
                other = content[:at] + content[at + n :]
            case 4:
                other = content[:at] + random.randbytes(n) + content[at:]
            case _:
                other = content[:at] + bytes(n) + content[at + n :]
        at = random.randrange(len(content))
    return other


def test_a_damaged_file_is_an_error(model: Model, tmp_path: Path) -> None:
    """In a thousand ways, a third of them in its head; the model goes on, and nothing of it is taken over."""
    file = tmp_path / "state"
    prompt = list(range(10, 40))
    ids(model, prompt, 2, session=file)
    content = file.read_bytes()
    head = 16 + 8 + int.from_bytes(content[20:24], sys.byteorder) + 32
    ids(model, [1, 2, 3], 1)
    random = Random(5)
    for number in range(1000):
        changed = damaged(content, random)
        if number % 3 == 0:
            changed = damaged(content[:head], random) + content[head:]
        file.write_bytes(changed)
        with pytest.raises(Error) as caught:
            model.load_state(file)
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)
    file.write_bytes(content)
    assert model.generate(prompt, max_tokens=1, reuse=True).stats.cached_tokens == 0
    model.load_state(file)
    assert model.generate(prompt, max_tokens=1, reuse=True).stats.cached_tokens > 0


def test_what_is_no_file(model: Model, tmp_path: Path) -> None:
    """Folders, and files that cannot be written, are told before anything is decoded."""
    for path, text in (
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "session", "its folder is missing"),
    ):
        with pytest.raises(Error, match=text):
            model.stream([1], session=path)
    (tmp_path / "empty").touch()
    with pytest.raises(Error, match="no saved state"):
        model.stream([1], session=tmp_path / "empty")
    with pytest.raises(TypeError, match="session"):
        model.stream([1], session=3)  # type: ignore[arg-type]


def test_when_a_session_is_written(model: Model, tmp_path: Path) -> None:
    """At the end, and when it is closed after a token; before that, and after an error, the old file stays."""
    session = tmp_path / "session"
    prompt = list(range(10, 60))

    def tokens() -> list[int]:
        found: list[int] = model._states.read(session).parts()[0].tolist()
        return found

    with model.stream(prompt, session=session):
        pass
    assert not session.exists()
    for _token in model.stream(prompt, session=session, **GREEDY):
        break
    assert tokens()[:50] == prompt
    assert len(tokens()) <= 53  # with what was decoded ahead
    kept = session.read_bytes()

    def fail(logits: object, tokens: object) -> int:
        raise LookupError("no token")

    with pytest.raises(LookupError):
        list(model.stream([5, *prompt], session=session, sampler=fail))
    stream = model.stream([5, *prompt], session=session)
    stream.close()
    assert stream.stats.stop_reason is StopReason.CLOSED
    assert session.read_bytes() == kept
    stream = model.stream([5, *prompt], session=session, max_tokens=3)
    reply = [next(stream).id for _ in range(3)]
    assert session.read_bytes() == kept  # its end was not asked for yet
    assert next(stream, None) is None
    assert tokens() == [5, *prompt, *reply[:2]]
    assert [file.name for file in tmp_path.iterdir()] == ["session"]

    async def some() -> None:
        async with model.astream([6, *prompt], session=session, max_tokens=4) as stream:
            async for _token in stream:
                pass

    asyncio.run(some())
    assert tokens()[:3] == [6, *prompt[:2]]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits for files")
def test_a_full_disk(model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The error names the file, the old one stays, and no draft is left."""
    import resource

    session = tmp_path / "session"
    prompt = list(range(10, 60))
    ids(model, prompt, 4, session=session)
    kept = session.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(Error, match=r"session: cannot be written: File too large"):
            ids(model, [5, *prompt], 4, session=session)
        with pytest.raises(Error, match="cannot be written"):
            model.save_state(session)
        for _token in model.stream([5, *prompt], session=session):
            break
        assert "cannot be written" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert session.read_bytes() == kept
    assert [file.name for file in tmp_path.iterdir()] == ["session"]


def test_chats_go_on(smollm2_path: Path, tmp_path: Path) -> None:
    """A saved conversation is not read again, whatever tokens its replies have."""
    settings: dict[str, Any] = {"n_ctx": 1024, "n_threads": N_THREADS}
    file = tmp_path / "talk.json"
    with Model(smollm2_path, **settings) as model:
        # A reply in tokens that its text would not be written in.
        wanted = model.tokenize("xa", add_special=False)[-1]
        chat = Chat(model, max_tokens=9, **GREEDY)
        chat.ask("Hello", logit_bias={wanted: 1e6})
        chat.ask("Is that so?", grammar='root ::= "Yes, it is."')
        chat.save(file, state=True)
        ids(model, [5, 6, 7], 2)
        unbroken = chat.ask("And then?")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.json", "talk.json.state"]
    with Model(smollm2_path, **settings) as model:
        chat = Chat.load(file, model, max_tokens=9, **GREEDY)
        reply = chat.ask("And then?")
        assert reply.text == unbroken.text
        new = reply.stats.prompt_tokens - reply.stats.cached_tokens
        assert (
            0 < new <= len(model.tokenize("<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"))
        )
        # Two at once, and a session of a chat.
        session = tmp_path / "session"
        other = Chat(model, session=session, max_tokens=9, **GREEDY)
        other.ask("What is the sea?")
    with Model(smollm2_path, **settings) as model:
        again = Chat(model, session=session, max_tokens=9, **GREEDY)
        again.messages = list(other.messages)
        stats = again.ask("Why?").stats
        assert stats.prompt_tokens - stats.cached_tokens <= 20
        state = file.with_name("talk.json.state")
        state.write_bytes(state.read_bytes()[:-1])
        with pytest.raises(Error, match=r"talk.json.state: is damaged"):
            Chat.load(file, model)
        state.unlink()
        assert len(Chat.load(file, model).messages) == 4


def test_on_the_command_line(smollm2_path: Path, tmp_path: Path) -> None:
    """``run --session`` and ``chat --session`` read what is new, and say what does not fit."""
    session, talk = tmp_path / "session", tmp_path / "talk.json"
    options = ("-n", "8", "--temp", "0", "-t", str(N_THREADS), "--session")
    first = command("run", smollm2_path, "Why is the sky blue?", *options, session)
    assert first.returncode == 0, first.stderr
    again = command("run", smollm2_path, "Why is the sky blue?", *options, session)
    assert again.stdout == first.stdout
    assert "cached" in again.stderr
    assert "cached" not in first.stderr
    for message in ("My name is Ada.", "What is my name?"):
        done = command("chat", smollm2_path, *options, talk, stdin=message)
        assert done.returncode == 0, done.stderr
    assert "cached" in done.stderr
    assert len(json.loads(talk.read_text())["messages"]) == 4
    refused = command("run", smollm2_path, "Hi", *options, talk)
    assert refused.returncode == 1
    assert "no saved state" in refused.stderr
    assert refused.stderr.count("\n") == 1
    refused = command("chat", smollm2_path, *options, talk, "--load", talk, stdin="Hi")
    assert refused.returncode == 2
    assert "either --session" in refused.stderr


@pytest.mark.parametrize("kind", ["smollm2", "mamba", "lfm2moe"])
def test_a_stream_that_is_closed_in_a_step_loses_nothing(
    path_of: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Recurrent layers forget all where a step is cancelled; the file then stays as it was."""
    session = tmp_path / "session"
    prompt = [int(token) for token in np.random.default_rng(3).integers(3, 500, 300)]
    settings: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "offload": "cpu"}
    with Model(path_of(kind), **settings) as model:
        model.generate(prompt, max_tokens=2, session=session, **GREEDY)
    for delay_s in (0.0, 0.002, 0.01, 0.03):
        with Model(path_of(kind), **settings) as model:
            stream = model.stream(prompt, session=session, **GREEDY)
            next(stream)
            threading.Timer(delay_s, stream.close).start()
            for _ in stream:
                pass
        head = session.read_bytes()[24:]
        assert json.JSONDecoder().raw_decode(head.decode("latin-1"))[0]["state"]["n_tokens"] >= len(prompt)


def test_a_sampler_may_close_a_stream_with_a_session(model: Model, tmp_path: Path) -> None:
    """It ends with the step, and is saved then."""
    session, streams = tmp_path / "session", list[Stream]()

    def close(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> None:
        if len(tokens) == 5:
            streams[0].close()

    streams.append(model.stream([1, 2, 3], session=session, sampler=close, **GREEDY))
    assert 1 <= len(list(streams[0])) <= 3
    assert session.exists()
