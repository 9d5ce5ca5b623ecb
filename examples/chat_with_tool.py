"""Talk with a model that may call a function; each line of standard input is a message, and an empty one ends it.

python examples/chat_with_tool.py MODEL
"""

import sys
from datetime import UTC, datetime, timedelta

import overspill


def get_time(utc_offset_hours: int = 0) -> str:
    """Get the date and time, at an offset from UTC in hours."""
    return (datetime.now(UTC) + timedelta(hours=utc_offset_hours)).isoformat(timespec="minutes")


def answer(chat: overspill.Chat, message: str) -> None:
    """Print the answer to a message; what the model calls on the way is called."""
    stream = chat.send(message, tools=[get_time])
    for token in stream:
        if token.channel is overspill.Channel.FINAL:
            print(token, end="", flush=True)
    if stream.tool_calls:
        for call in stream.tool_calls:  # arguments fit the function's signature
            chat.add_result(call, get_time(**call.arguments))
        for token in chat.send():
            print(token, end="", flush=True)
    print()


with overspill.Model(sys.argv[1]) as model:
    chat = overspill.Chat(model, system="Be brief.", max_tokens=200, temperature=0)
    for line in sys.stdin:
        if not line.strip():
            break
        answer(chat, line.strip())
