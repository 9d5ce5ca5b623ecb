"""Choose tokens in Python: the likeliest one that the last twenty tokens do not have.

python examples/own_sampler.py MODEL ["Once upon a time"]
"""

import sys

import numpy as np
from numpy.typing import NDArray

import overspill

path, *rest = sys.argv[1:]
prompt = rest[0] if rest else "Once upon a time"


def choose(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> int:
    """Return a token id; ``logits`` is a view on llama.cpp's memory, and may be edited."""
    logits[tokens[-20:]] = -np.inf
    return int(logits.argmax())


with overspill.Model(path) as model:
    for token in model.stream(prompt, sampler=choose, max_tokens=40):
        print(token, end="", flush=True)
print()
