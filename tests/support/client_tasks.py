"""What clients of the server ask for in tests: an answer of a known form, and calls of a tool.

Clients evaluate the annotations, so they are none of the future.
"""

from typing import Any, Literal

from pydantic import BaseModel


class Colour(BaseModel):
    """What the model is to fill in."""

    name: Literal["red", "green", "blue"]
    is_warm: bool


WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Tell the weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
"""A function whose arguments cannot become long."""
QUESTION = "What is gravity?"
"""The first eight tokens of SmolLM2's greedy answer are likelier than all others by more than rounding moves them."""
LIKE_THIS = 'Write this: {"name": "red", "is_warm": true}'
"""A question for a JSON object whose form the server is not told: a small model repeats it."""
CHOICE = "Choose a colour."
"""A question after which a small model calls a tool, if it has to."""
WEATHER_QUESTION = "What will the weather be in Rome?"
TOO_LONG = "word " * 3000


def get_weather(city: Literal["Rome", "Oslo"], days: Literal[1, 2, 3]) -> str:
    """Tell the weather in a city, for some days."""
    assert fits_weather({"city": city, "days": days})
    return "sunny"


def fits_weather(arguments: object) -> bool:
    """Return whether the arguments of a call are what the tool's schema allows."""
    match arguments:
        case {"city": "Rome" | "Oslo", "days": int(days)}:
            return days in (1, 2, 3)
    return False
