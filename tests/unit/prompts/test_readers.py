import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from dapo_mcore.config import SourceConfig
from dapo_mcore.prompts.readers import read_problems, set_names

DATA = Path(os.environ.get("DAPO_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
NAME = "data.train"


def refusal(source: SourceConfig) -> str:
    with pytest.raises(ValueError, match=r"data\.train|\.parquet|\.jsonl") as error:
        read_problems(source, NAME)
    return str(error.value)


def test_a_text_prompt_is_one_user_message(jsonl):
    file = jsonl({"prompt": "1 + 1 = ?", "answer": 2, "level": "easy"})
    (problem,) = read_problems(SourceConfig(files=[file]), NAME)
    assert problem.messages == ({"role": "user", "content": "1 + 1 = ?"},)
    assert problem.answer == "2"
    assert problem.metadata == {"answer": 2, "level": "easy"}


def test_gsm8k_answers_are_what_follows_the_hashes(jsonl):
    file = jsonl(
        {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72"},
        {"question": "How much?", "answer": "It is a lot.\n#### 70,000"},
    )
    source = SourceConfig(files=[file], prompt_key="question", answer_pattern=r"####\s*(.+)")
    assert [p.answer for p in read_problems(source, NAME)] == ["72", "70,000"]


def test_rows_are_counted_over_all_files_and_blank_lines_are_no_rows(jsonl):
    first = jsonl({"prompt": "a", "answer": "1"}, b"", {"prompt": "b", "answer": "2"}, name="first.jsonl")
    second = jsonl({"prompt": "c", "answer": "3"}, name="second.jsonl")
    problems = read_problems(SourceConfig(files=[first, second]), NAME)
    assert [(p.row, p.question) for p in problems] == [(0, "a"), (1, "b"), (2, "c")]
    assert problems[1].place.endswith("first.jsonl row 3")


def test_a_problem_belongs_to_the_set_that_its_row_names_or_else_its_file(jsonl):
    named = {"prompt": "a", "answer": "1", "data_source": "openai/gsm8k"}
    first = jsonl(named, {**named, "data_source": None}, {**named, "data_source": " "}, name="aime24.jsonl")
    second = jsonl({"prompt": "b", "answer": "2"}, name="math.500.jsonl")
    problems = read_problems(SourceConfig(files=[first, second]), NAME)
    assert [p.source for p in problems] == ["openai/gsm8k", "aime24", "aime24", "math.500"]
    assert {p.source for p in read_problems(SourceConfig(task="chain_sum", size=2), NAME)} == {"chain_sum"}


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["data/aime24.jsonl"], ["aime24"]),
        (["aime24/test.parquet", "math/test.parquet"], ["aime24/test", "math/test"]),
        (["/a/x/test.jsonl", "/b/x/test.jsonl", "/b/x/train.jsonl"], ["a/x/test", "b/x/test", "b/x/train"]),
        (["test.jsonl", "b/test.jsonl"], ["test", "b/test"]),
        (["same.jsonl", "same.jsonl", "same.parquet"], ["same", "same", "same"]),
        ([], []),
    ],
)
def test_files_of_the_same_name_are_told_apart_by_their_folders(files, names):
    assert set_names(files) == names


def test_size_takes_the_first_rows(jsonl):
    file = jsonl(*({"prompt": str(i), "answer": "x"} for i in range(5)), b"not read")
    assert [p.question for p in read_problems(SourceConfig(files=[file], size=3), NAME)] == ["0", "1", "2"]


def test_the_layout_of_verl_is_read_as_it_is(tmp_path):
    file = tmp_path / "verl.parquet"
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i}?"}],
            "reward_model": {"ground_truth": str(i), "style": "rule"},
            "extra_info": {"index": i},
        }
        for i in range(2_000)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), file)
    problems = read_problems(SourceConfig(files=[str(file)], answer_key="reward_model.ground_truth"), NAME)
    assert [p.answer for p in problems] == [str(i) for i in range(2_000)]
    assert problems[1_999].messages[0] == {"role": "system", "content": "Be brief."}
    assert problems[1_999].metadata["extra_info"] == {"index": 1_999}


def test_a_column_whose_own_name_has_a_dot_comes_first(jsonl):
    file = jsonl({"prompt": "q", "a.b": "flat", "a": {"b": "nested"}})
    (problem,) = read_problems(SourceConfig(files=[file], answer_key="a.b"), NAME)
    assert problem.answer == "flat"


GOOD = {"prompt": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "q"}, "no column answer_key=answer (there are: prompt)"),
        ({"question": "q", "answer": "a"}, "no column prompt_key=prompt (there are: question, answer)"),
        ({"prompt": "q", "answer": None}, "no answer in answer_key=answer"),
        ({"prompt": "q", "answer": "  "}, "no answer in answer_key=answer"),
        ({"prompt": "q", "answer": float("nan")}, "no answer in answer_key=answer"),
        ({"prompt": "q", "answer": ["a"]}, "answer_key=answer holds a list"),
        ({"prompt": " \n", "answer": "a"}, "empty prompt"),
        ({"prompt": [], "answer": "a"}, "empty prompt"),
        ({"prompt": [{"role": "user", "content": ""}], "answer": "a"}, "empty prompt"),
        ({"prompt": [{"role": "user"}], "answer": "a"}, "neither text nor a list of {role, content}"),
        ({"prompt": 7, "answer": "a"}, "neither text nor a list of {role, content}"),
        (
            {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "answer": "a"},
            "assistant",
        ),
        (b'{"prompt": "q", "answer": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud83d", "answer": "a"}', "not Unicode"),
        (b'{"prompt": "q", "answer": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'"q"', "not a JSON object"),
    ],
)
def test_a_row_that_is_no_problem_is_refused_by_file_and_number(jsonl, row, fault):
    file = jsonl(GOOD, row, GOOD)
    message = refusal(SourceConfig(files=[file]))
    assert "data.train: 1 of 3 rows cannot be used" in message
    assert f"{file}: row 2: " in message
    assert fault in message


def test_all_bad_rows_stand_in_one_error_and_five_of_a_kind_are_named(jsonl):
    file = jsonl(GOOD, *[{"prompt": "q", "answer": ""}] * 7, b"{", GOOD)
    message = refusal(SourceConfig(files=[file]))
    assert "8 of 10 rows" in message
    assert "row 2, 3, 4, 5, 6 and 2 more: no answer" in message
    assert "row 9: not JSON" in message
    assert "correct or remove them" in message


def test_an_answer_that_the_pattern_misses_is_refused(jsonl):
    file = jsonl({"prompt": "q", "answer": "no hashes"})
    assert "finds nothing" in refusal(SourceConfig(files=[file], answer_pattern="#### (.+)"))


@pytest.mark.parametrize(("pattern", "fault"), [("####", "has no group"), ("(", "not a regular expression")])
def test_a_pattern_that_cannot_work_is_refused(jsonl, pattern, fault):
    assert fault in refusal(SourceConfig(files=[jsonl(GOOD)], answer_pattern=pattern))


def test_text_in_parquet_that_is_not_utf8_is_refused_by_row(tmp_path):
    file = tmp_path / "broken.parquet"
    data = b"good\xff\xfebad"
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 4, 6, 9], pa.int32()).buffers()[1], pa.py_buffer(data)]
    )
    parquet.write_table(pa.table({"prompt": text, "answer": ["a", "b", "c"]}), file)
    message = refusal(SourceConfig(files=[str(file)]))
    assert "1 of 3 rows" in message
    assert f"{file}: row 2: not UTF-8" in message


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    file = tmp_path / "cut.parquet"
    file.write_bytes(b"PAR1 and then nothing")
    assert f"{file}: not readable as parquet" in refusal(SourceConfig(files=[str(file)]))


@pytest.mark.parametrize(
    ("file", "fault"), [("rows.csv", "neither .jsonl nor .parquet"), ("rows.jsonl", "no such file")]
)
def test_a_file_that_cannot_be_read_is_refused(file, fault):
    assert fault in refusal(SourceConfig(files=[file]))


def test_an_empty_data_set_is_refused(jsonl):
    assert "data.train: no problems in" in refusal(SourceConfig(files=[jsonl()]))


def test_a_task_gives_its_questions_and_carries_the_entry_for_its_scorer():
    source = SourceConfig(task="chain_sum", size=3, seed=7, task_options={"min_terms": 2, "max_terms": 2})
    problems = read_problems(source, NAME)
    assert len({p.question for p in problems}) == 3
    for problem in problems:
        expression = problem.metadata["entry"]["metadata"]["expression"]
        assert expression in problem.question
        assert problem.answer == str(eval(expression))
        assert problem.metadata["task_options"] == {"min_terms": 2, "max_terms": 2}


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (SourceConfig(task="chain_summ", size=3), "data.train.task=chain_summ"),
        (SourceConfig(task="chain_sum", size=3, task_options={"terms": 2}), "data.train.task_options={'terms': 2}"),
        (SourceConfig(task="chain_sum", size=3, task_options={"min_terms": -1}), "data.train.task_options"),
        (SourceConfig(task="chain_sum"), "data.train.size=-1"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused_by_option(source, fault):
    assert fault in refusal(source)


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"GSM8K is not in {DATA}/gsm8k; set DAPO_TEST_DATA")
@pytest.mark.parametrize(("part", "rows"), [("train", 7_473), ("test", 1_319)])
def test_every_row_of_gsm8k_is_read_and_has_a_number_for_an_answer(part, rows):
    source = SourceConfig(
        files=[str(DATA / "gsm8k" / f"{part}.jsonl")], prompt_key="question", answer_pattern=r"####\s*(.+)"
    )
    problems = read_problems(source, NAME)
    assert len(problems) == rows
    assert all(float(problem.answer.replace(",", "")) is not None for problem in problems)
