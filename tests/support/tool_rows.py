"""The rows of configs/data/tools.jsonl and tools_held_out.jsonl: requests, of which some need a tool.

    python tests/support/tool_rows.py       # writes both files again

A response with a tool is one call between two tokens that no tokenizer has. Cities, names and phrases of
held-out rows are in no training row, and no request is.
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "data"
TOKENS = ("<tool>", "</tool>")
COUNTS = {"tools.jsonl": 640, "tools_held_out.jsonl": 64}

CITIES = (
    "Lisbon", "Oslo", "Vienna", "Dublin", "Prague", "Madrid", "Athens", "Warsaw", "Helsinki", "Geneva",
    "Boston", "Denver", "Seattle", "Dallas", "Toronto", "Lima", "Quito", "Bogota", "Havana", "Cairo",
    "Tunis", "Nairobi", "Lagos", "Delhi", "Mumbai", "Tokyo", "Osaka", "Seoul", "Manila", "Sydney",
)  # fmt: skip
OTHER_CITIES = (
    "Berlin", "Zurich", "Chicago", "Montreal", "Santiago", "Accra", "Hanoi", "Kyoto", "Melbourne", "Porto",
)  # fmt: skip
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Karen", "Leo",
    "Maria", "Noah", "Olivia", "Paul", "Rosa", "Sam", "Tina", "Victor",
)  # fmt: skip
OTHER_NAMES = ("Alice", "Bruno", "Daisy", "Felix", "Hanna", "Oscar", "Peter", "Sofia")
PHRASES = (
    "blue lamps", "seven red boats", "the door is open", "good morning", "old books", "fresh bread",
    "two cats", "open windows", "green hills", "slow trains", "warm rain", "a quiet street", "black coffee",
    "long letters", "paper planes", "cold water",
)  # fmt: skip
OTHER_PHRASES = (
    "silver spoons", "the light is on", "good evening", "wooden chairs", "dry leaves", "three dogs",
)  # fmt: skip
DAYS = ("today", "tomorrow", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

WEATHER = (
    "What's the weather in {city} {day}?", "Will it rain in {city} {day}?",
    "weather for {city}, {day} please",
    "I'm going to {city} {day}. Do I need a coat?", "How warm is it in {city} {day}?",
)  # fmt: skip
TIMER = (
    "Set a timer for {n} minutes.", "Wake me in {n} minutes", "Remind me in {n} minutes, please.",
    "{n} minutes on the clock!", "Start a {n} minute timer",
)  # fmt: skip
SUM = (
    "What is {a} {op} {b}?", "Compute {a} {op} {b}.", "{a} {op} {b} = ?", "I need the result of {a} {op} {b}",
)  # fmt: skip
GREETING = ("Say hello to {name}.", "Please greet {name} for me", "{name} just came in. Say hello!")
ECHO = ("Repeat after me: {phrase}", 'Say "{phrase}".', "Please write the words {phrase}")
THANKS = ("Thanks for the {phrase}!", "Thank you, I got the {phrase}", "great, {phrase}, thanks a lot")


def call(text):
    """A response that calls a tool."""
    return f"{TOKENS[0]}{text}{TOKENS[1]}"


def row(rng, held_out):
    """A request and its response."""
    kind = rng.choice(("weather", "weather", "timer", "sum", "sum", "greeting", "echo", "thanks"))
    if kind == "weather":
        city, day = rng.choice(OTHER_CITIES if held_out else CITIES), rng.choice(DAYS)
        return rng.choice(WEATHER).format(city=city, day=day), call(f"weather: {city}, {day}")
    if kind == "timer":
        n = rng.randrange(2, 120)
        return rng.choice(TIMER).format(n=n), call(f"timer: {n} minutes")
    if kind == "sum":
        a, op, b = rng.randrange(10, 1000), rng.choice("+-*/"), rng.randrange(2, 100)
        return rng.choice(SUM).format(a=a, op=op, b=b), call(f"calculate: {a} {op} {b}")
    if kind == "greeting":
        name = rng.choice(OTHER_NAMES if held_out else NAMES)
        return rng.choice(GREETING).format(name=name), f"Hello, {name}!"
    phrase = rng.choice(OTHER_PHRASES if held_out else PHRASES)
    if kind == "echo":
        return rng.choice(ECHO).format(phrase=phrase), phrase
    return rng.choice(THANKS).format(phrase=phrase), "You're welcome."


def rows(name):
    """The lines of one of the files; no request is in it twice, or in the training rows."""
    rng, found, held_out = random.Random(name), {}, "held_out" in name
    known = {line["instruction"] for line in rows("tools.jsonl")} if held_out else set()
    while len(found) < COUNTS[name]:
        request, response = row(rng, held_out)
        if request not in known:
            found[request] = response
    return [{"instruction": request, "response": response} for request, response in found.items()]


def text(name):
    """The content of one of the files."""
    return "".join(json.dumps(line) + "\n" for line in rows(name))


if __name__ == "__main__":
    for file in COUNTS:
        (FOLDER / file).write_text(text(file))
