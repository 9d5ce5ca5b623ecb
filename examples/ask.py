"""Ask a model with a chat template one question, and print the answer with its stats.

python examples/ask.py MODEL ["Why is the sky blue?"]
"""

import sys

import overspill

path, *rest = sys.argv[1:]
question = rest[0] if rest else "Why is the sky blue?"

with overspill.Model(path) as model:
    reply = model.ask(question, system="Answer in one sentence.", max_tokens=100, temperature=0)

print(reply.text)
print(reply.stats, file=sys.stderr)
