"""Answer two prompts at the same time with asyncio, and give up after a minute.

python examples/several_at_once.py MODEL
"""

import asyncio
import sys

import overspill


async def continued(model: overspill.Model, prompt: str) -> str:
    """Return a prompt's continuation; the event loop is free meanwhile."""
    parts = [str(token) async for token in model.astream(prompt, max_tokens=20, temperature=0)]
    return "".join(parts)


async def main(path: str) -> None:
    """Print both continuations in the order of their prompts."""
    prompts = ["Once upon a time", "The sea is"]
    with overspill.Model(path, n_ctx=1024) as model:
        async with asyncio.timeout(60):
            for prompt, text in zip(
                prompts, await asyncio.gather(*(continued(model, prompt) for prompt in prompts)), strict=True
            ):
                print(repr(prompt + text))


asyncio.run(main(sys.argv[1]))
