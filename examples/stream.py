"""Continue a text token by token, and leave the loop after a whole sentence.

python examples/stream.py MODEL ["Once upon a time"]
"""

import sys

import overspill

path, *rest = sys.argv[1:]
prompt = rest[0] if rest else "Once upon a time"

with overspill.Model(path) as model, model.stream(prompt, max_tokens=100, temperature=0) as stream:
    for token in stream:
        print(token, end="", flush=True)
        if token.text.endswith("."):
            break  # ends the stream: nothing more is decoded

print()
print(stream.stats, file=sys.stderr)
