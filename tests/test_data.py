"""Every way of giving data yields the same rows, and every mistake is named with its file and line."""

from __future__ import annotations

import gzip
import json
import os
import pickle

import pytest
import torch
from datasets import Dataset, DatasetDict

from foretell.data.formats import load_rows
from foretell.data.rows import detect_form

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
ROWS = [
    {"messages": CHAT},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"text": "two and two"},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"prompt": "2 + 2 ="},
]
FORMS = ["messages", "prompt_completion", "prompt_completion", "text", "input_ids", "prompt"]


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("row", "form"), list(zip(ROWS, FORMS)))
def test_each_form_is_told_by_its_columns(row, form):
    assert detect_form(row) == form
    assert detect_form({**row, "id": 3, "score": 0.5, "source": None}) == form  # other columns are ignored


def test_a_prompt_column_beside_messages_is_no_second_form():
    assert detect_form({"messages": CHAT, "prompt": "2 + 2?", "prompt_id": "a"}) == "messages"


def test_none_counts_as_absent():
    # what a dataset of mixed forms looks like
    assert detect_form({"messages": None, "text": "two"}) == "text"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "text": "both"},
        {"prompt": "a", "completion": "b", "text": "both"},
        {"input_ids": [1], "messages": CHAT},
    ],
)
def test_two_forms_in_one_row_are_refused(row):
    with pytest.raises(ValueError, match="ambiguous row: got the columns.*one form only"):
        detect_form(row)


def test_an_unknown_form_says_what_came_and_hints_at_sharegpt():
    with pytest.raises(ValueError, match=r"got the columns \['question'\], wanted 'messages'"):
        detect_form({"question": "why"})
    with pytest.raises(ValueError, match="rename 'conversations'"):
        detect_form({"conversations": [{"from": "human", "value": "hi"}]})


def test_all_sources_give_the_same_rows(tmp_path):
    texts = [{"text": "one"}, {"text": "two"}]
    write_lines(tmp_path / "rows.jsonl", texts)
    (tmp_path / "rows.json").write_text(json.dumps(texts, indent=1))
    write_lines(tmp_path / "lines.json", texts)
    dataset = Dataset.from_list(texts)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.to_csv(tmp_path / "rows.csv")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write((tmp_path / "rows.jsonl").read_text())
    (tmp_path / "results.json").write_text(json.dumps({"config": {}, "results": texts}))
    (tmp_path / "indented.json").write_text(json.dumps({"config": {}, "results": texts}, indent=1))
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    sources = [
        *(tmp_path / name for name in ("rows.jsonl", "rows.json", "lines.json", "rows.parquet", "saved", "splits")),
        *(tmp_path / name for name in ("rows.csv", "rows.jsonl.gz", "results.json", "indented.json")),
        str(tmp_path / "rows.jsonl"),
        dataset,
        DatasetDict({"train": dataset}),
        texts,
        load_rows(texts),
    ]
    for source in sources:
        rows = load_rows(source)
        assert list(rows) == texts, source
        assert rows[-1] == texts[1] and rows[:1] == texts[:1] and len(rows) == 2
    assert load_rows(tmp_path / "rows.jsonl").where(1) == "rows.jsonl, line 2"
    assert load_rows(tmp_path / "rows.json").where(1) == "rows.json, item 2"
    assert load_rows(tmp_path / "rows.parquet").where(1) == "rows.parquet, row 2"
    assert load_rows(texts).where(1) == "rows[1]"


def test_chat_rows_survive_parquet(tmp_path):
    Dataset.from_list([{"messages": CHAT}]).to_parquet(tmp_path / "chat.parquet")
    assert list(load_rows(tmp_path / "chat.parquet")) == [{"messages": CHAT}]


def test_folder_takes_all_files_or_those_of_the_split(tmp_path):
    write_lines(tmp_path / "b.jsonl", [{"text": "b"}])
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "README.md").write_text("not data")
    assert [row["text"] for row in load_rows(tmp_path)] == ["a", "b"]
    assert load_rows(tmp_path).where(1) == "b.jsonl, line 1"
    with pytest.raises(ValueError, match="no file of the split 'test'"):
        load_rows(tmp_path, split="test")
    write_lines(tmp_path / "train-00001.jsonl", [{"text": "train"}])
    write_lines(tmp_path / "my_test.jsonl", [{"text": "test"}])
    assert [row["text"] for row in load_rows(tmp_path)] == ["train"]
    assert [row["text"] for row in load_rows(tmp_path, split="test")] == ["test"]


def test_a_lone_test_file_is_never_trained_on(tmp_path):
    write_lines(tmp_path / "test.jsonl", [{"text": "held out"}])
    with pytest.raises(ValueError, match="no file of the split 'train'"):
        load_rows(tmp_path)


def test_lines_are_counted_with_blank_ones(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "one"}, "", {"text": "two"}])
    assert load_rows(path).where(1) == "rows.jsonl, line 3"


BAD_ROWS = [
    ("{not json", "line 2: got '{not json', wanted one JSON object"),
    ("[1, 2]", r"line 2: got list \[1, 2\], wanted an object"),
    ({"question": "x"}, "line 2: unknown form"),
    ({"messages": "hello"}, "line 2: messages: got str 'hello', wanted a list"),
    ({"messages": []}, "line 2: messages: got an empty list"),
    ({"messages": ["hi"]}, r"line 2: messages\[0\]: got str 'hi', wanted"),
    ({"messages": [{"content": "hi"}]}, r"line 2: messages\[0\]: got the role NoneType None"),
    ({"messages": [{"role": "user", "content": 4}]}, r"line 2: messages\[0\]: got the content int 4, wanted a string"),
    ({"messages": [{"role": "user", "content": " "}]}, "line 2: messages: every message is empty"),
    ({"text": ""}, "line 2: text: got an empty string"),
    ({"text": "  \n"}, "line 2: text: got an empty string"),
    ({"text": 7}, "line 2: text: got int 7, wanted a string"),
    ({"prompt": "a", "completion": ""}, "line 2: completion: got an empty string"),
    ({"prompt": "a", "completion": CHAT}, "line 2: completion: got list"),
    ({"prompt": CHAT[:1], "completion": "a"}, "line 2: completion: got str 'a', wanted a list"),
    ({"input_ids": []}, "line 2: input_ids: got an empty list"),
    ({"input_ids": [[1, 2]]}, "line 2: input_ids: .*wanted a flat list"),
    ({"input_ids": [1, -2]}, "line 2: input_ids: .*wanted a flat list of token ids"),
    ({"input_ids": [1, 2.5]}, "line 2: input_ids: .*wanted a flat list of token ids"),
    ({"input_ids": [1, 2], "labels": [1]}, "line 2: labels: got 1 values, wanted one for each of the 2 input_ids"),
    ({"input_ids": [1, 2], "loss_mask": [1, 2]}, r"line 2: loss_mask: got \[2\], wanted 0 or 1"),
    ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, r"line 2: labels\[0\]: got 2, wanted .*not shifted"),
    ({"input_ids": [1, 0], "attention_mask": [1, 0]}, "line 2: attention_mask: got zeros, wanted unpadded rows"),
    ({"input_ids": [1, 2], "hidden_states": [[0.5]]}, "line 2: hidden_states: got 1 states, wanted one for each of"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, row, message):
    path = write_lines(tmp_path / "prompts.jsonl", [{"text": "fine"}, row])
    with pytest.raises(ValueError, match="^prompts.jsonl, " + message):
        load_rows(path)


@pytest.mark.parametrize("row", ROWS)
def test_good_rows_pass_the_same_checks(tmp_path, row):
    assert list(load_rows(write_lines(tmp_path / "prompts.jsonl", [row]))) == [row]


def test_a_turn_that_only_calls_a_tool_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert len(load_rows([{"messages": [CHAT[0], call]}])) == 1


def test_tensors_are_fine_as_ready_rows():
    row = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, 2]), "hidden_states": torch.zeros(2, 4)}
    assert len(load_rows([row])) == 1


def test_problems_are_collected_up_to_ten(tmp_path):
    few = write_lines(tmp_path / "few.jsonl", [{"text": "fine"}, {"text": ""}, "{", {"text": "fine"}])
    with pytest.raises(ValueError, match="line 2") as error:
        load_rows(few)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["few.jsonl, line 2", "few.jsonl, line 3"]
    many = write_lines(tmp_path / "many.jsonl", [{"text": ""}] * 30)
    with pytest.raises(ValueError, match="stopped after 10 problems") as error:
        load_rows(many)
    assert len(str(error.value).splitlines()) == 11


def test_a_truncated_file_is_named_with_its_last_line(tmp_path):
    path = write_lines(tmp_path / "cut.jsonl", [{"text": "one"}, {"text": "two"}])
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(ValueError, match="cut.jsonl, line 2: got"):
        load_rows(path)
    Dataset.from_list([{"text": "one"}]).to_parquet(tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.parquet: got a file that is no whole parquet"):
        load_rows(tmp_path / "cut.parquet")
    (tmp_path / "cut.json").write_text('[{"text": "one"},\n{"te')
    with pytest.raises(ValueError, match="cut.json, line 2: wanted a JSON list"):
        load_rows(tmp_path / "cut.json")


def test_a_gz_is_read_as_it_is_now_and_must_be_whole(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    for texts in (["one"], ["two", "three"]):
        with gzip.open(path, "wt") as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
        assert [row["text"] for row in load_rows(path)] == texts
    assert load_rows(path).where(1) == "rows.jsonl.gz, line 2"
    path.write_bytes(path.read_bytes()[:-12])
    for _ in range(2):
        with pytest.raises(ValueError, match="rows.jsonl.gz: got a file that is no whole gz file"):
            load_rows(path)


def test_of_lines_only_their_places_are_held(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": f"{number} " * 50} for number in range(2000)])
    rows = load_rows(path)
    assert len(pickle.dumps(rows)) < 40 * len(rows) < path.stat().st_size // 2
    assert rows.source is None and load_rows(rows) is rows
    part = pickle.loads(pickle.dumps(rows)).part(slice(5, 1000, 5))
    assert part[3]["text"].startswith("20 ") and part.where(3) == "rows.jsonl, line 21" and len(part) == 199


@pytest.mark.parametrize("change", ["longer", "other words"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, change):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    rows = load_rows(path)
    with path.open("r+") as file:
        file.write('{"text": "six"}\n' + '{"text": "two"}\n' * (2 if change == "longer" else 1))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="the file changed while it was read"):
        rows[1]


def test_so_many_bad_rows_are_skipped_and_no_more(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": ""}, "{", {"text": "two"}])
    with pytest.warns(UserWarning, match="2 rows are skipped"):
        assert len(load_rows(path, skip_bad=2)) == 2
    with pytest.raises(ValueError, match=r"(?s)2 bad rows, wanted 1 at most:\nrows.jsonl, line 2.*line 3"):
        load_rows(path, skip_bad=1)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="bytes.jsonl, line 2: got"):
        load_rows(tmp_path / "bytes.jsonl")


def test_a_parquet_file_without_rows_is_empty_and_not_torn(tmp_path):
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(str(tmp_path / "train-0.parquet"))
    Dataset.from_dict({"text": ["one"]}).select([]).to_parquet(str(tmp_path / "train-1.parquet"))
    with pytest.raises(ValueError, match="^train-1.parquet: the file is empty, wanted at least one row$"):
        load_rows(tmp_path)
    (tmp_path / "train-1.parquet").unlink()
    assert len(load_rows(tmp_path)) == 2


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(ValueError, match="empty.jsonl: the file is empty, wanted at least one row"):
        load_rows(tmp_path / "empty.jsonl")


def test_other_empty_sources_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        load_rows([])
    with pytest.raises(ValueError, match="no rows"):
        load_rows(Dataset.from_list([]))
    with pytest.raises(ValueError, match="no .jsonl, .json, .parquet, .csv file in this folder"):
        load_rows(tmp_path)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match="empty.json: the file is empty"):
        load_rows(tmp_path / "empty.json")


def test_sources_that_are_not_there_or_not_data(tmp_path):
    for name in ("missing.jsonl", "./missing", str(tmp_path / "missing")):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            load_rows(name)
    (tmp_path / "rows.txt").write_text("a,b")
    with pytest.raises(ValueError, match="rows.txt: got a file of type '.txt', wanted .jsonl"):
        load_rows(tmp_path / "rows.txt")
    with pytest.raises(ValueError, match=r"no split 'train': got \['test'\]"):
        load_rows({"test": [{"text": "a"}]})
    with pytest.raises(ValueError, match="got generator, wanted something with a length"):
        load_rows(row for row in ROWS)
    with pytest.raises(ValueError, match=r"rows\[1\]: text: got an empty string"):
        load_rows(Dataset.from_list([{"text": "a"}, {"text": ""}]))


def test_a_dataset_by_name_goes_to_the_datasets_library(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "nobody/nothing":
            raise FileNotFoundError("not on the Hub")
        return Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("somebody/some-data:main", split="test").where(0) == "somebody/some-data:main[0]"
    assert asked == [(("somebody/some-data", "main"), {"split": "test"})]
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no such file or folder, and no dataset"):
        load_rows("nobody/nothing")
