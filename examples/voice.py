"""The voice file of a small restaurant: what the gateway answers Vapi with.

Point GATEWAY_VAPI_FILE at a copy of it. The gateway runs the file once, when it starts, so
restart the gateway after a change. Any of the names below may be missing. Functions may be
`async def`; those that are not run in a thread of their own, so that they may block.
"""

import datetime

# Who answers a call to a number that has no assistant in Vapi's dashboard: the id of a saved
# assistant, or the assistant itself as in Vapi's reference. Its model is the gateway, under the
# public address by which Vapi reaches it.
ASSISTANT = {
    "name": "Trattoria Luna",
    "firstMessage": "Trattoria Luna, good evening. How can I help?",
    "model": {
        "provider": "custom-llm",
        "url": "https://gateway.example.com/v1",
        "model": "Qwen/Qwen3-8B",
        "messages": [
            {
                "role": "system",
                "content": "You answer the phone of a restaurant. Keep to one or two sentences.",
            }
        ],
    },
}

# In place of ASSISTANT, where it depends on the call:
#
#     def assistant(message):
#         if message["call"]["customer"]["number"] in BLOCKED:
#             return {"error": "Sorry, we cannot take your call."}
#         return "the-id-of-a-saved-assistant"

BOOKED: dict[str, int] = {}
SEATS = 40


def opening_hours(day: str) -> str:
    """Say when the restaurant is open. What a tool returns, the model reads."""
    return "closed" if day.lower() == "monday" else "18:00 to 23:00"


def book_table(date: str, guests: int, name: str) -> dict[str, object]:
    """Book a table. What is not text is sent as JSON.

    An exception becomes an error for the model, without its text; the gateway's log has the
    line and the type.
    """
    day = datetime.date.fromisoformat(date).isoformat()
    if BOOKED.get(day, 0) + guests > SEATS:
        return {"booked": False, "reason": "no table is free"}
    BOOKED[day] = BOOKED.get(day, 0) + guests
    return {"booked": True, "date": day, "guests": guests, "name": name}


# The functions that the model may call, by the names of its tools; nothing else of this file can
# be. Define the same names and parameters as tools of the assistant in Vapi.
TOOLS = [opening_hours, book_table]

# How long one of them may take, in seconds. Vapi waits 20 s unless told otherwise.
TOOL_LIMIT_S = 10


def transfer(message: dict[str, object]) -> str:
    """Say where a call goes that the model wants to transfer: a number, or Vapi's destination."""
    return "+15550100"


async def documents(message: dict[str, list[dict[str, str]]]) -> list[dict[str, object]]:
    """Return what the model should know for its next answer, the best first."""
    asked = message["messages"][-1]["content"].lower()
    if "vegan" in asked:
        return [{"content": "Vegan dishes: orecchiette, caponata.", "similarity": 0.9}]
    return []
