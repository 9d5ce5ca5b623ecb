"""Print xllamacpp's tokens per second and its greedy reply, as JSON.

``decode_with_xllamacpp.py MODEL PROMPT N_TOKENS N_THREADS`` runs in an environment that has it.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def main() -> None:
    """Decode, and print the speed and the text."""
    path, prompt, n_tokens, n_threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel = 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    server = xllamacpp.Server(params)
    request = {"prompt": prompt, "n_predict": n_tokens + 1, "temperature": 0, "ignore_eos": True}
    reply = server.handle_completions(request)
    reply = reply if isinstance(reply, dict) else json.loads(reply)
    print(json.dumps([reply["timings"]["predicted_per_second"], reply["choices"][0]["text"]]))


if __name__ == "__main__":
    main()
