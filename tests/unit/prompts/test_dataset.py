import pytest
from tokenizers.processors import TemplateProcessing

from dapo_mcore.config import DataConfig, SourceConfig, Truncation
from dapo_mcore.prompts.dataset import build_prompts, fingerprint
from dapo_mcore.prompts.encode import with_instruction

NAME = "data.train"
RAW = {"apply_chat_template": False}


@pytest.fixture
def questions(jsonl):
    def source(*texts: str, name: str = "rows.jsonl") -> SourceConfig:
        return SourceConfig(files=[jsonl(*({"prompt": text, "answer": "a"} for text in texts), name=name)])

    return source


def test_the_chat_template_ends_with_the_generation_prompt(questions, tokenizer):
    prompts = build_prompts(questions("1+1?"), DataConfig(), tokenizer, NAME).prompts
    assert prompts[0].text == "<user>1+1?\n<assistant>"
    assert len(prompts[0].token_ids) == len("<user>1+1?\n<assistant>")


def test_without_a_template_the_prompt_is_the_text_as_it_is(questions, tokenizer):
    (prompt,) = build_prompts(questions(" 1+1? é🙂"), DataConfig(**RAW), tokenizer, NAME).prompts
    assert prompt.text == " 1+1? é🙂"
    assert len(prompt.token_ids) == len(" 1+1? é🙂".encode())


def test_without_a_template_a_beginning_of_sequence_is_kept_and_with_one_none_is_added(questions, make_tokenizer):
    tokenizer = make_tokenizer(bos_token="<s>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (raw,) = build_prompts(questions("ab"), DataConfig(**RAW), tokenizer, NAME).prompts
    (chat,) = build_prompts(questions("ab"), DataConfig(), tokenizer, NAME).prompts
    assert raw.token_ids == (bos, *chat.token_ids)
    assert raw.text == "<s>ab"


def test_a_tokenizer_that_ends_every_text_is_refused(questions, make_tokenizer):
    tokenizer = make_tokenizer()
    end = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=end)
    with pytest.raises(ValueError, match="add_eos_token"):
        build_prompts(questions("ab"), DataConfig(**RAW), tokenizer, NAME)


def test_a_tokenizer_whose_beginning_and_end_are_one_token_may_begin_with_it(questions, make_tokenizer):
    tokenizer = make_tokenizer(bos_token="</s>")
    both = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=both)
    assert build_prompts(questions("ab"), DataConfig(**RAW), tokenizer, NAME).prompts[0].text == "</s>ab"


def test_an_instruction_leaves_the_messages_of_the_row_as_they_are():
    messages = [{"role": "user", "content": "1+1?"}]
    assert with_instruction(messages, "Box it.") == [{"role": "user", "content": "1+1? Box it."}]
    assert messages == [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("instruction", "text"), [("Box it.", "1+1? Box it."), ("\nBox it.", "1+1?\nBox it."), ("", "1+1?")]
)
def test_the_instruction_is_appended_to_the_question(questions, tokenizer, instruction, text):
    data = DataConfig(instruction=instruction, **RAW)
    assert build_prompts(questions("1+1?"), data, tokenizer, NAME).prompts[0].text == text


def test_the_instruction_goes_to_the_last_message(jsonl, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    source = SourceConfig(files=[jsonl({"prompt": messages, "answer": "2"})])
    (prompt,) = build_prompts(source, DataConfig(instruction="Box it."), tokenizer, NAME).prompts
    assert prompt.text == "<system>Be brief.\n<user>1+1? Box it.\n<assistant>"


def test_a_model_without_a_chat_template_is_refused_with_the_option_to_change(questions, make_tokenizer):
    with pytest.raises(ValueError, match=r"data.apply_chat_template=True.*set it to false"):
        build_prompts(questions("q"), DataConfig(), make_tokenizer(), NAME)


def test_several_messages_need_a_template(jsonl, tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file = jsonl({"prompt": messages, "answer": "2"})
    with pytest.raises(ValueError, match=r"rows.jsonl row 1 has 2 messages"):
        build_prompts(SourceConfig(files=[file]), DataConfig(**RAW), tokenizer, NAME)


def test_messages_that_the_template_refuses_are_named(questions, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ValueError, match=r"rows.jsonl row 1 with roles \['user'\] \(no users here\)"):
        build_prompts(questions("q"), DataConfig(), tokenizer, NAME)


def test_overlong_prompts_are_dropped_and_counted(questions, tokenizer):
    built = build_prompts(
        questions("123456", "12345", "1234567", "1"), DataConfig(max_prompt_length=5, **RAW), tokenizer, NAME
    )
    assert [p.text for p in built.prompts] == ["12345", "1"]
    assert [(p.uid, p.row) for p in built.prompts] == [(0, 1), (1, 3)]
    assert str(built.counts) == "2 of 4 prompts (0 also in validation, 2 over-long, 0 truncated)"


@pytest.mark.parametrize(("truncation", "text"), [(Truncation.left, "23456"), (Truncation.right, "12345")])
def test_overlong_prompts_are_cut_where_asked(questions, tokenizer, truncation, text):
    data = DataConfig(max_prompt_length=5, filter_overlong_prompts=False, truncation=truncation, **RAW)
    built = build_prompts(questions("123456", "1"), data, tokenizer, NAME)
    assert [p.text for p in built.prompts] == [text, "1"]
    assert (built.counts.truncated, built.counts.overlong, built.counts.kept) == (1, 0, 2)


def test_overlong_prompts_are_refused_by_row_when_neither_dropped_nor_cut(questions, tokenizer):
    data = DataConfig(max_prompt_length=5, filter_overlong_prompts=False, **RAW)
    with pytest.raises(ValueError, match=r"2 prompts are longer.*=5 tokens, the longest has 7 \(.*row 2, .*row 3\)"):
        build_prompts(questions("1", "123456", "1234567"), data, tokenizer, NAME)


def test_a_prompt_knows_the_set_it_belongs_to(questions, tokenizer):
    prompts = build_prompts(questions("a", name="aime24.jsonl"), DataConfig(), tokenizer, "data.val").prompts
    assert [prompt.source for prompt in prompts] == ["aime24"]


def test_validation_questions_are_kept_out_of_training(questions, tokenizer):
    val = build_prompts(
        questions("b", "this one is over-long", name="val.jsonl"),
        DataConfig(max_prompt_length=5, **RAW),
        tokenizer,
        "data.val",
    )
    train = build_prompts(
        questions("a", " b\n", "c", "b", "this one is  over-long"),
        DataConfig(**RAW),
        tokenizer,
        NAME,
        exclude=val.questions,
    )
    assert [p.text for p in train.prompts] == ["a", "c"]
    assert (train.counts.excluded, train.counts.rows) == (3, 5)


def test_nothing_left_is_refused_with_the_counts(questions, tokenizer):
    with pytest.raises(ValueError, match=r"data.train: 0 of 2 prompts \(1 also in validation, 1 over-long"):
        build_prompts(questions("a", "1234567"), DataConfig(max_prompt_length=5, **RAW), tokenizer, NAME, exclude={"a"})


def test_the_fingerprint_knows_order_text_and_answer(jsonl, tokenizer):
    def of(*rows: tuple[str, str]) -> str:
        file = jsonl(*({"prompt": prompt, "answer": answer} for prompt, answer in rows))
        return fingerprint(build_prompts(SourceConfig(files=[file]), DataConfig(**RAW), tokenizer, NAME).prompts)

    base = of(("a", "1"), ("b", "2"))
    assert base == of(("a", "1"), ("b", "2"))
    assert (
        len({base, of(("b", "2"), ("a", "1")), of(("a", "1"), ("b", "3")), of(("a", "1"), ("c", "2")), of(("a", "1"))})
        == 5
    )
