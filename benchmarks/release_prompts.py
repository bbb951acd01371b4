"""Prompts of many kinds for the module that ships with the package: templates with slots, and the user's own data.

    python benchmarks/release_prompts.py --output runs/release/prompts.jsonl

With FORETELL_DATA (a folder) the training parts of what lies there come in too: arithmetic word problems
(gsm8k_train.jsonl), coding tasks (gpteacher_codegen.json), chats (torchspec_conversations.jsonl). None of it is kept in
the repository. Kinds that are measured on held-out prompts (stories, translation, summaries, roleplay, extraction,
rewriting) are never written here.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.config import parse

TOPICS = """photosynthesis|the water cycle|gravity|inflation|supply and demand|compound interest|a budget|insurance
vaccines|antibiotics|the immune system|sleep|hydration|stretching|strength training|running|swimming|cycling
yoga|meditation|stress|time management|procrastination|public speaking|a job interview|a resume|negotiation
teamwork|leadership|feedback|remote work|email|meetings|project planning|version control|unit tests|recursion
a hash table|binary search|sorting|a linked list|a stack|a queue|a database index|caching|an API|HTTP|DNS
encryption|a firewall|passwords|phishing|backups|the cloud|containers|machine learning|neural networks
overfitting|a decision tree|linear regression|statistics|probability|the mean and the median
standard deviation|fractions|percentages|ratios|prime numbers|the Pythagorean theorem|angles|area and volume
a function|a derivative|an integral|a matrix|a vector|atoms|molecules|the periodic table|acids and bases
chemical bonds|energy|electricity|magnetism|light|sound|heat|waves|friction|Newton's laws|the solar system
the moon|eclipses|comets|black holes|stars|galaxies|the seasons|weather|clouds|hurricanes|earthquakes
volcanoes|rivers|deserts|rainforests|oceans|coral reefs|glaciers|climate change|recycling|composting
solar panels|wind power|nuclear power|electric cars|public transport|cities|bridges|houses|gardening|tomatoes
herbs|soil|pruning|bees|butterflies|birds|whales|dolphins|elephants|cats|dogs|horses|snakes|frogs|dinosaurs
evolution|DNA|cells|bacteria|viruses|fungi|the heart|the brain|the lungs|digestion|muscles|bones|skin
nutrition|protein|vitamins|sugar|salt|bread|pasta|rice|soup|salad|coffee|tea|chocolate|cheese|spices|knives
baking|grilling|freezing food|democracy|elections|a constitution|human rights|taxes|banks|stocks|bonds
mortgages|trade|tariffs|unemployment|startups|marketing|branding|customer service|pricing|inventory|logistics
contracts|patents|copyright|ancient Egypt|ancient Greece|the Roman Empire|the Middle Ages|the Renaissance
the printing press|the Industrial Revolution|the steam engine|railways|the telephone|radio|television
computers|the internet|photography|painting|sculpture|music|the piano|the guitar|jazz|opera|dance|theatre|film
poetry|novels|grammar|punctuation|essays|debate|logic|ethics|philosophy|psychology|memory|habits|motivation
friendship|parenting|school|homework|exams|languages|travel|maps|camping|hiking|fishing|chess|football
basketball|tennis|the Olympics|photosharing|social media|news|privacy|robots|drones|3D printing
virtual reality"""

NAMES = """Anna|Ben|Chloe|David|Elena|Farid|Grace|Hugo|Ines|Jonas|Kim|Leo|Maya|Noah|Olga|Pablo|Rosa|Sam|Tara|Yusuf"""
THINGS = """apples|books|pencils|tickets|stickers|marbles|cookies|coins|stamps|plants|bottles|chairs|cards|eggs"""
LANGUAGES = """Python|Python|Python|JavaScript|Java|C|C++|Go|Rust|SQL|Bash|Ruby"""
TASKS = """reverses a string|checks whether a word is a palindrome|counts the vowels of a text
finds the largest number of a list|adds two matrices|computes a factorial|prints the first n Fibonacci numbers
removes duplicates from a list|merges two sorted lists|counts how often each word occurs
converts Celsius to Fahrenheit|checks whether a number is prime|sorts a list of names
finds the second smallest number|rotates a list by k places|computes the average of a list
flattens a nested list|reads a file line by line|writes rows to a CSV file|parses a date
validates an email address|generates a random password|computes the greatest common divisor
transposes a matrix|finds all divisors of a number|converts a number to binary
finds the longest word of a sentence|capitalises each word|counts the lines of a file|implements a stack
implements a queue|does a binary search|computes the power of a number|checks whether two words are anagrams
groups words by their first letter|finds missing numbers in a range|sums the digits of a number
prints a multiplication table|zips two lists into pairs"""

ASK: dict[str, list[str]] = {
    "explain": [
        "Explain {topic} to a beginner.", "What is {topic}?", "Can you explain how {topic} works?",
        "Give a short introduction to {topic}.", "Why does {topic} matter?", "Explain {topic} in simple words.",
        "Explain {topic} to a ten year old.", "What should everybody know about {topic}?",
        "Describe {topic} in one paragraph.", "How would a teacher introduce {topic}?",
    ],
    "list": [
        "List five facts about {topic}.", "Give me seven tips about {topic}.",
        "Name three common mistakes with {topic}.",
        "What are the main benefits of {topic}?", "List the advantages and disadvantages of {topic}.",
        "Give me ten words that have to do with {topic}.", "What are four myths about {topic}?",
        "Write a checklist for {topic}.", "What are the key parts of {topic}?",
    ],
    "question": [
        "Who should learn about {topic}, and why?", "When did people first study {topic}?",
        "What is the difference between {topic} and {other}?", "How are {topic} and {other} related?",
        "Is {topic} hard to learn?", "What is the most important thing about {topic}?",
        "How has {topic} changed over the last hundred years?", "What do experts disagree about in {topic}?",
    ],
    "advice": [
        "I want to learn about {topic}. Where should I start?", "How can I get better at {topic}?",
        "Make a one-week plan for learning {topic}.", "My friend {name} asks me about {topic}. What should I say?",
        "I have thirty minutes a day for {topic}. How should I use them?", "What tools do I need for {topic}?",
        "I am worried about {topic}. Can you help me?", "How do I talk with my boss about {topic}?",
    ],
    "teach": [
        "Write three quiz questions about {topic} with answers.", "Make a glossary of five terms of {topic}.",
        "Outline a lecture about {topic}.", "Write an outline for an essay about {topic}.",
        "Give an example that makes {topic} easy to understand.", "Compare {topic} with {other} in a table.",
        "Write a step-by-step guide to {topic}.", "What would a textbook chapter about {topic} contain?",
    ],
    "write": [
        "Write a short email to {name} about {topic}.", "Write a product description for a book about {topic}.",
        "Write a polite letter to {name} that asks for help with {topic}.", "Write a headline about {topic}.",
        "Write a slogan for a club about {topic}.", "Write an invitation to a talk on {topic} by {name}.",
        "Write a speech of one minute about {topic}.", "Write a review of a course on {topic}.",
    ],
    "code": [
        "Write a {language} function that {task}.", "Write a {language} program that {task}. Explain it briefly.",
        "How do I write code in {language} that {task}?", "Show me a {language} example that {task}.",
        "Write a {language} function that {task}, and a test for it.",
    ],
    "arithmetic": [
        "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
        "{name} has {a} {thing} and gives {c} of them to {friend}. How many are left?",
        "A box holds {b} {thing}. How many {thing} are in {c} boxes?",
        "What is {a} plus {b}?", "What is {a} times {c}?", "Calculate {a} - {c} and show the steps.",
        "{name} earns {b} dollars an hour and works {c} hours. How much does {name} earn?",
        "What is {c} percent of {a}?", "A train travels {a} miles in {c} hours. What is its average speed?",
    ],
}  # fmt: skip


def split(text: str) -> list[str]:
    """The entries of a table above."""
    return [part for line in text.splitlines() for part in line.split("|") if part]


def written(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts from the templates, no two alike."""
    rng, topics, tasks = random.Random(seed), split(TOPICS), split(TASKS)
    kinds = [kind for kind in ASK for _ in range(len(ASK[kind]))]
    found: dict[str, str] = {}
    while len(found) < count:
        kind = rng.choice(kinds)
        name, friend = rng.sample(split(NAMES), 2)
        topic, other = rng.sample(topics, 2)
        slots = {
            "topic": topic, "other": other, "name": name, "friend": friend, "thing": rng.choice(split(THINGS)),
            "a": rng.randrange(20, 400), "b": rng.randrange(3, 60), "c": rng.randrange(2, 20),
            "language": rng.choice(split(LANGUAGES)), "task": rng.choice(tasks),
        }  # fmt: skip
        found.setdefault(rng.choice(ASK[kind]).format(**slots), kind)
    return [{"prompt": prompt, "kind": kind} for prompt, kind in found.items()]


def given(folder: Path) -> list[dict[str, str]]:
    """First turns of the training data that the user has."""
    rows: list[dict[str, str]] = []

    def read(name: str) -> list[Any]:
        path = folder / name
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines() if line]

    rows += [{"prompt": row["question"], "kind": "gsm8k"} for row in read("gsm8k_train.jsonl")]
    for row in read("gpteacher_codegen.json"):
        both = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
        rows.append({"prompt": both, "kind": "gpteacher"})
    rows += [
        {"prompt": row["conversations"][0]["content"], "kind": "chat"} for row in read("torchspec_conversations.jsonl")
    ]
    return rows


@dataclass(kw_only=True)
class PromptSettings:
    """Flags of benchmarks/release_prompts.py."""

    output: str = field(default="runs/release/prompts.jsonl", metadata={"help": "Where the prompts go."})
    written: int = field(default=9000, metadata={"help": "Prompts from the templates."})
    given: int = field(default=6000, metadata={"help": "At most so many of FORETELL_DATA."})
    longest: int = field(default=600, metadata={"help": "Characters of a prompt."})
    seed: int = field(default=0, metadata={"help": "Of slots and order."})


def main() -> None:
    """Write the prompts, shuffled."""
    import sys

    settings = parse(PromptSettings, sys.argv[1:], prog="benchmarks/release_prompts.py")
    rng = random.Random(settings.seed)
    own = given(Path(os.environ["FORETELL_DATA"])) if "FORETELL_DATA" in os.environ else []
    own = [row for row in {row["prompt"]: row for row in own}.values() if len(row["prompt"]) <= settings.longest]
    rng.shuffle(own)
    rows = written(settings.written, settings.seed) + own[: settings.given]
    rng.shuffle(rows)
    path = Path(settings.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[row["kind"]] = kinds.get(row["kind"], 0) + 1
    print(f"{len(rows)} prompts in {path}: {kinds}")


if __name__ == "__main__":
    main()
