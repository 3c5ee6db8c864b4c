import json
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.errors import UserError
from services.text.config import Columns, DataSection
from services.text.readers import looks_like_a_path, split_of_name
from services.text.sources import hash_split, load_prompts, prompt_id_of

ROWS = [{"prompt": f"What is number {i}?", "response": f"It is {i}."} for i in range(200)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def section(source, **fields):
    return DataSection(source=str(source), **fields)


def all_prompts(splits):
    return [*splits.train, *splits.validation, *splits.test]


def test_jsonl_is_split_by_hash_into_disjoint_parts(tmp_path):
    path = write(tmp_path / "data.jsonl", ROWS)
    splits = load_prompts(section(path))
    assert splits == load_prompts(section(path))
    ids = [prompt.prompt_id for prompt in all_prompts(splits)]
    assert len(set(ids)) == len(ids) == 200
    assert all(len(prompt_id) == 16 for prompt_id in ids)
    assert 5 < len(splits.test) < 40
    assert 5 < len(splits.validation) < 40
    assert splits.train[0].reference is not None
    assert splits.named("test") is splits.test


def test_a_prompt_keeps_its_split_and_id_when_others_are_added_or_the_file_moves(tmp_path):
    few = load_prompts(section(write(tmp_path / "data.jsonl", ROWS[:100])))
    (tmp_path / "elsewhere").mkdir()
    many = load_prompts(section(write(tmp_path / "elsewhere" / "data.jsonl", ROWS[::-1])))
    for split in ("train", "validation", "test"):
        assert {p.prompt_id for p in few.named(split)} <= {p.prompt_id for p in many.named(split)}


def test_duplicates_are_counted(tmp_path):
    splits = load_prompts(section(write(tmp_path / "data.jsonl", ROWS + ROWS[:7])))
    assert splits.duplicates == 7
    assert len(all_prompts(splits)) == 200


def test_a_prompt_that_is_held_out_is_not_trained_on(tmp_path):
    rows = [{**ROWS[0], "split": "train"}, {**ROWS[0], "split": "test"}, {**ROWS[1], "split": "train"}]
    splits = load_prompts(section(write(tmp_path / "data.jsonl", rows), validation_fraction=0))
    assert [p.text for p in splits.train] == [ROWS[1]["prompt"]]
    assert [p.text for p in splits.test] == [ROWS[0]["prompt"]]
    assert splits.duplicates == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "x"', "not valid JSON"),
        (b'["x"]', "expected one JSON object a line, got list"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "  "}', "the prompt is empty"),
        (b'{"prompt": null}', "the prompt is empty"),
        (b'{"prompt": 3}', "'prompt' is int"),
        (b'{"promt": "x"}', "has no 'prompt'; the nearest is 'promt'"),
        (b'{"prompt": "x", "response": 3}', "'response' is int, not text"),
        (b'{"prompt": "x", "keywords": [1]}', "not a text or a list of texts"),
        (b'{"prompt": [{"role": "user"}]}', "message 0"),
        (b'{"prompt": []}', "the prompt is empty"),
        (b'{"prompt": [{"role": "user", "content": " "}]}', "the prompt is empty"),
        (b'{"prompt": [{"role": "system", "content": "x"}]}', "must be the user's"),
        (b'{"prompt": "x", "prompt_class": 3}', "'prompt_class' is int, not text"),
        (b'{"prompt": "x", "prompt_class": "Red team"}', "'Red team', allowed are names of a-z"),
        (b'{"prompt": "x", "split": "tset"}', "'tset', allowed are train"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_file_and_line(tmp_path, line, said):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        load_prompts(section(path))
    assert f"{path}:3: " in str(error.value)
    assert said in str(error.value)


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\n\n{"prompt": "two"}\n')
    splits = load_prompts(section(path, validation_fraction=0, test_fraction=0))
    assert [p.text for p in splits.train] == ["one", "two"]


def test_a_column_that_is_missing_names_the_nearest(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"quesiton": "x", "answer": "y"}])
    with pytest.raises(UserError, match="no column 'question'; the nearest is 'quesiton'"):
        load_prompts(section(path, columns=Columns(prompt="question")))
    with pytest.raises(UserError, match=r"data.columns.prompt: .*columns: quesiton, answer"):
        load_prompts(section(path))


def test_columns_by_name_and_by_custom(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "Hi?", "answer": "a", "facts": ["f"], "keywords": "k"}])
    (prompt,) = load_prompts(section(path, columns=Columns(prompt="q"), test_fraction=0, validation_fraction=0)).train
    assert (prompt.text, prompt.reference, prompt.facts, prompt.keywords) == ("Hi?", "a", ("f",), ("k",))


def test_a_prompts_class_is_its_rows_or_the_sources(tmp_path):
    rows = [{"prompt": "a", "prompt_class": "reasoning", "kind": "x"}, {"prompt": "b", "kind": "red_team"}]
    path = write(tmp_path / "a.jsonl", rows)
    whole = {"test_fraction": 0, "validation_fraction": 0}

    def classes(**fields):
        return [prompt.prompt_class for prompt in load_prompts(section(path, **whole, **fields)).train]

    assert classes() == ["reasoning", None]
    assert classes(prompt_class="chat") == ["reasoning", "chat"]
    assert classes(columns=Columns(prompt_class="kind")) == ["x", "red_team"]
    with pytest.raises(ValidationError, match="prompt_class"):
        section(path, prompt_class="No name")


def test_messages_end_with_the_user_and_an_assistant_at_the_end_is_the_reference(tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = write(tmp_path / "data.jsonl", [row])
    (prompt,) = load_prompts(section(path, test_fraction=0, validation_fraction=0)).train
    assert [message.content for message in prompt.messages] == ["a", "b", "c"]
    assert prompt.reference == "d"


def test_ids_tell_equal_prompts_apart_and_must_be_unique(tmp_path):
    rows = [{"id": 1, "prompt": "x"}, {"id": 2, "prompt": "x"}]
    fields = {"columns": Columns(id="id"), "validation_fraction": 0, "test_fraction": 0}
    splits = load_prompts(section(write(tmp_path / "a.jsonl", rows), **fields))
    assert len(splits.train) == 2
    path = write(tmp_path / "b.jsonl", [*rows, {"id": 1, "prompt": "y"}])
    with pytest.raises(UserError, match=r"b\.jsonl:3: the id in column 'id' names another prompt"):
        load_prompts(section(path, **fields))
    with pytest.raises(UserError, match=r"c\.jsonl:1: has no id"):
        load_prompts(section(write(tmp_path / "c.jsonl", [{"id": None, "prompt": "x"}]), **fields))


def test_a_directory_of_files_keeps_its_own_splits(tmp_path):
    write(tmp_path / "train.jsonl", ROWS[:50])
    write(tmp_path / "test.jsonl", ROWS[50:60])
    splits = load_prompts(section(tmp_path))
    assert len(splits.test) == 10
    assert len(splits.train) + len(splits.validation) == 50
    assert len(splits.validation) > 0
    mixed = load_prompts(section(tmp_path, split="hash"))
    assert {p.text for p in mixed.test} != {p.text for p in splits.test}
    assert len(load_prompts(section(tmp_path, limit=5, validation_fraction=0)).train) == 5


def test_parquet_and_its_faults(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert len(all_prompts(load_prompts(section(path)))) == 200
    pq.write_table(pa.Table.from_pylist([{"prompt": "x"}, {"prompt": ""}]), path)
    with pytest.raises(UserError, match=r"data\.parquet row 2: the prompt is empty"):
        load_prompts(section(path))
    path.write_bytes(b"PAR1 not at all")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        load_prompts(section(path))


def test_saved_datasets_with_and_without_splits(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    assert len(all_prompts(load_prompts(section(tmp_path / "one")))) == 200
    both = datasets.DatasetDict({"train": one.select(range(150)), "validation": one.select(range(150, 200))})
    both.save_to_disk(tmp_path / "both")
    splits = load_prompts(section(tmp_path / "both", test_fraction=0))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (150, 50, 0)
    datasets.DatasetDict({"train": one, "extra": one}).save_to_disk(tmp_path / "odd")
    with pytest.raises(UserError, match="split 'extra'"):
        load_prompts(section(tmp_path / "odd"))


def test_own_splits_where_there_are_none(tmp_path):
    with pytest.raises(UserError, match=r"data\.split: own"):
        load_prompts(section(write(tmp_path / "data.jsonl", ROWS), split="own"))


def test_missing_files_and_empty_ones(tmp_path):
    write(tmp_path / "prompts.jsonl", ROWS)
    with pytest.raises(UserError, match=r"does not exist; did you mean 'prompts\.jsonl'"):
        load_prompts(section(tmp_path / "promts.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="has no rows"):
        load_prompts(section(tmp_path / "empty.jsonl"))
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError, match="holds no saved dataset"):
        load_prompts(section(tmp_path / "hollow"))
    (tmp_path / "data.csv").write_text("a")
    with pytest.raises(UserError, match=r"set data\.format"):
        load_prompts(section(tmp_path / "data.csv"))


def test_generated_corpora(qa_pairs):
    splits = load_prompts(DataSection())
    assert [len(splits.named(name)) for name in ("train", "validation", "test")] == [8000, 1000, 1000]
    assert splits.duplicates == 0
    own = Counter((pair.prompt, pair.split) for pair in qa_pairs)
    assert own == Counter((p.text, name) for name in ("train", "validation", "test") for p in splits.named(name))
    assert len(load_prompts(DataSection(source="generated:instructions")).train) == 4000


@pytest.mark.parametrize(
    "fields",
    [
        {"source": "generated:jokes"},
        {"template": "no place"},
        {"validation_fraction": 0.6, "test_fraction": 0.5},
        {"limit": 0},
        {"sorce": "x"},
        {"columns": {"promt": "x"}},
    ],
)
def test_sections_refuse(fields):
    with pytest.raises(ValidationError):
        DataSection(**fields)


@pytest.mark.parametrize(
    ("source", "is_path"),
    [("squad", False), ("owner/name", False), ("./data", True), ("/a/b", True), ("a/b/c", True), ("x.jsonl", True)],
)
def test_paths_and_hub_names(source, is_path):
    assert looks_like_a_path(source) is is_path


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002", "train"),
        ("val", "validation"),
        ("dev.v2", "validation"),
        ("testing", "test"),
        ("trainer", None),
    ],
)
def test_split_names(name, split):
    assert split_of_name(name) == split


@given(st.integers(0, 1000), st.floats(0, 0.5), st.floats(0, 0.49))
def test_the_split_follows_the_fractions(seed, validation, test):
    found = Counter(hash_split(prompt_id_of("s", str(i)), seed, validation, test) for i in range(600))
    assert abs(found["validation"] / 600 - validation) < 0.11
    assert abs(found["test"] / 600 - test) < 0.11
