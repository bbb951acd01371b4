"""Checks on the prompt collection used by ``foretell demo``."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "foretell" / "data" / "demo_prompts.jsonl"
CATEGORIES = {
    "arithmetic",
    "code",
    "lists",
    "rewriting",
    "qa",
    "chat",
    "extraction",
    "story",
}
MAX_WORDS = 169
MAX_CHARS = 1000
MIN_WORDS = 4
NGRAM = 5
MAX_SHARED = 0.6


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def ngrams(text, n=NGRAM):
    tokens = words(text)
    if len(tokens) < n:
        return {tuple(tokens)}
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


@pytest.fixture(scope="module")
def rows():
    with PATH.open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def test_fields(rows):
    for row in rows:
        assert set(row) == {"id", "category", "split", "prompt"}
        assert all(isinstance(value, str) for value in row.values())
        assert row["category"] in CATEGORIES
        assert row["split"] in {"train", "test"}
        assert re.fullmatch(re.escape(row["category"]) + r"-\d{3}", row["id"]), row["id"]


def test_counts(rows):
    assert len(rows) >= 400
    assert {row["category"] for row in rows} == CATEGORIES
    test = Counter(row["category"] for row in rows if row["split"] == "test")
    assert test == {category: 10 for category in CATEGORIES}
    train = Counter(row["category"] for row in rows if row["split"] == "train")
    assert all(train[category] >= 40 for category in CATEGORIES)


def test_unique(rows):
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids)
    prompts = [" ".join(words(row["prompt"])) for row in rows]
    repeated = [prompt for prompt, count in Counter(prompts).items() if count > 1]
    assert not repeated


def test_lengths(rows):
    for row in rows:
        prompt = row["prompt"]
        assert prompt == prompt.strip(), row["id"]
        assert MIN_WORDS <= len(prompt.split()) <= MAX_WORDS, row["id"]
        assert len(prompt) <= MAX_CHARS, row["id"]


def test_splits_do_not_overlap(rows):
    train = [(row["id"], ngrams(row["prompt"])) for row in rows if row["split"] == "train"]
    for row in rows:
        if row["split"] != "test":
            continue
        grams = ngrams(row["prompt"])
        for train_id, train_grams in train:
            shared = len(grams & train_grams) / len(grams)
            assert shared <= MAX_SHARED, (row["id"], train_id, shared)
