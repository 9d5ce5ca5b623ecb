"""Make a dataclass of a text: the reply fits a JSON schema, whatever the model.

python examples/json_to_dataclass.py MODEL ["A text about a book"]
"""

import json
import sys
from dataclasses import asdict, dataclass

import overspill

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 60},
        "year": {"type": "integer", "minimum": 1400, "maximum": 2100},
        "kind": {"enum": ["novel", "poem", "other"]},
    },
    "required": ["title", "year", "kind"],
}


@dataclass
class Book:
    """What is to be found in the text."""

    title: str
    year: int
    kind: str


path, *rest = sys.argv[1:]
text = rest[0] if rest else "Moby-Dick is a novel by Herman Melville, published in 1851."

with overspill.Model(path) as model:
    reply = model.generate(f"{text}\nThe book as JSON: ", json_schema=SCHEMA, max_tokens=200, temperature=0)

book = Book(**json.loads(reply.text))
print(json.dumps(asdict(book)))
