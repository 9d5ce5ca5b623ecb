"""Ask a small model first, and a large one where the small one is not sure of its answer.

python examples/cascade.py SMALL LARGE ["Why is the sky blue?"]
"""

import sys

import overspill

small, large, *rest = sys.argv[1:]
question = rest[0] if rest else "Why is the sky blue?"

with (
    overspill.Cascade(small, large, overspill.mean_logprob(below=-1.0)) as cascade,
    cascade.stream(question, max_tokens=60, temperature=0) as reply,
):
    for token in reply:
        print(token, end="", flush=True)

print()
print(reply.stats, file=sys.stderr)  # which model answered, and why
