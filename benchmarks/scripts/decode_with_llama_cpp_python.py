"""Print llama-cpp-python's tokens per second, as JSON.

``decode_with_llama_cpp_python.py MODEL N_TOKENS N_THREADS OPTIONS`` runs in an environment that has it. ``OPTIONS`` are
those of its ``generate``, as JSON.
"""

from __future__ import annotations

import json
import sys
import time

from llama_cpp import Llama


def main() -> None:
    """Decode, and print the speed."""
    path, n_tokens, n_threads, options = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    model = Llama(path, n_ctx=512, n_threads=n_threads, n_threads_batch=n_threads, seed=1, verbose=False)
    prompt = model.tokenize(b"Once upon a time")
    stream = model.generate(prompt, repeat_penalty=1.0, reset=True, **options)
    next(stream)
    start = time.perf_counter()
    for _ in range(n_tokens):
        next(stream)
    print(json.dumps([n_tokens / (time.perf_counter() - start)]))


if __name__ == "__main__":
    main()
