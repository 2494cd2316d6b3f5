from __future__ import annotations

from typing import Any

import pytest

from preln.base.errors import InputError
from preln.heal.rows.encode import IGNORED, Encoded
from preln.heal.rows.encode import encode_rows as stream_rows
from preln.models import tiny_tokenizer

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Again?"},
]
EACH = "{% for m in messages %}"
# the marks of five families, as their published templates write them
TEMPLATES = {
    "chatml": (
        EACH + "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "{}<|im_end|>",
    ),
    "llama-3": (
        "{% set day = date_string or strftime_now('%f') %}{{ '<|im_start|>' + day }}"
        + EACH
        + "{{ '<h>' + m.role + '</h>\\n\\n' + m.content | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<h>assistant</h>\\n\\n' }}{% endif %}",
        "{}<|eot|>",
    ),
    "llama-2": (
        EACH + "{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}",
        " {} <|endoftext|>",
    ),
    "phi-3": (
        EACH + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}",
        "{}<|im_end|>",
    ),
    "thinking": (
        EACH + "{{ '<|im_start|>' + m.role + '\\n' }}{% if loop.last and m.role == 'assistant' %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        None,
    ),
}  # fmt: skip


def encode_rows(*given, **options):
    return list(stream_rows(*given, **options))


def _tokenizer(template: str | None, merges: list[tuple[str, str]] | None = None) -> Any:
    tokenizer = tiny_tokenizer()
    if merges:
        from tokenizers import models

        vocabulary = tokenizer.get_vocab()
        for left, right in merges:
            vocabulary[left + right] = len(vocabulary)
        tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot|>"]})
    tokenizer.chat_template = template
    return tokenizer


def _supervised(row: Encoded, tokenizer: Any) -> list[str]:
    """The text of every run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row.ids, row.labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_chat_is_supervised_on_what_the_assistant_writes(family: str) -> None:
    template, form = TEMPLATES[family]
    tokenizer = _tokenizer(template)
    (row,) = encode_rows([{"messages": TALK}], tokenizer)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False, date_string="26 Jul 2024")
    assert tokenizer.decode(row.ids) == whole
    wanted = ["Hello.", "Again?"]
    if form is None:
        wanted = ["Hello.<|im_end|>", "<think>\n\n</think>\n\nAgain?<|im_end|>"]
    else:
        wanted = [form.format(reply) for reply in wanted]
    assert _supervised(row, tokenizer) == wanted
    # what comes before a supervised run is what the model is given when it is asked for that turn
    begin = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    asked = tokenizer.apply_chat_template(
        TALK[:2], tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
    )
    assert tokenizer.decode(row.ids[:begin]) == asked
    (everything,) = encode_rows([{"messages": TALK}], tokenizer, supervise="all")
    assert everything.ids == row.ids == everything.labels


def test_a_reply_is_found_by_its_place_not_by_its_words() -> None:
    """Replies that repeat the question, the template, or the end-of-turn token itself."""
    tokenizer = _tokenizer(TEMPLATES["chatml"][0])
    for reply in ("Hi", "user\nHi", "<|im_end|>", "a<|im_end|>b", "", " \n x ", "assistant\n"):
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": reply}]
        (row,) = encode_rows([{"messages": talk}], tokenizer)
        assert _supervised(row, tokenizer) == [reply + "<|im_end|>"], reply


def test_white_space_that_the_tokenizer_joins_to_a_reply() -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a. "}]
    # the template's blank behind the reply becomes one token with the reply's own
    spaced = TEMPLATES["chatml"][0].replace("m.content + '<|im_end|>'", "m.content + ' <|im_end|>'")
    tokenizer = _tokenizer(spaced, merges=[("Ġ", "Ġ")])
    (row,) = encode_rows([{"messages": talk}], tokenizer)
    assert _supervised(row, tokenizer) == ["a.  <|im_end|>"]
    assert row.ids[-3] == tokenizer.convert_tokens_to_ids("ĠĠ")
    # ... and here three characters of which two were the reply's, one token each
    tokenizer = _tokenizer(spaced, merges=[("Ċ", "Ġ"), ("Ġ", "ĊĠ")])
    talk[1]["content"] = "a \n"
    (row,) = encode_rows([{"messages": talk}], tokenizer)
    assert _supervised(row, tokenizer) == ["a \n <|im_end|>"]
    assert row.ids[-3] == tokenizer.convert_tokens_to_ids("ĠĊĠ")
    # a template that trims the reply
    tokenizer = _tokenizer(TEMPLATES["llama-3"][0])
    (row,) = encode_rows([{"messages": talk}], tokenizer)
    assert _supervised(row, tokenizer) == ["a<|eot|>"]
    # the reply's first character becomes part of the template's last token
    tokenizer = _tokenizer(TEMPLATES["chatml"][0], merges=[("Ċ", "Ċ")])
    talk[1]["content"] = "\n\na."
    with pytest.raises(InputError, match="row 0: message 1: the tokenizer joins the reply's first"):
        encode_rows([{"messages": talk}], tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (EACH + "{{ m.content | upper }}<|eot|>{% endfor %}", "rewrites the reply"),
        (EACH + "{{ m.content[:3] }}<|eot|>{% endfor %}", "rewrites the reply|generation prompt"),
        (EACH + "{{ m.content + '\\n' }}{% endfor %}", "no token of its own"),
        (EACH + "{{ m.content + ' END<|eot|>' }}{% endfor %}", "writes more behind the reply"),
        (EACH + "{{ m.content }}<|eot|>{% endfor %}{% if add_generation_prompt %}B:{% endif %}", "prompt"),
        (EACH + "{{ raise_exception('no system\\nrole') }}{% endfor %}", r"refuses it \(no system\)"),
        ("{{ messages[99].content }}{{ 1 + 'a' }}", "refuses it"),
    ],
)
def test_templates_that_hide_the_reply_are_refused(template: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"held out, row 0: .*({reason})") as caught:
        encode_rows([{"messages": TALK}], _tokenizer(template), name="held out")
    assert "\n" not in str(caught.value)


def test_one_turn_rows_become_a_chat() -> None:
    tokenizer = _tokenizer(TEMPLATES["chatml"][0])
    rows = [ALPACA, {"prompt": "Add.\n\n1 2", "completion": "3"}]
    rows.append(
        {"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]}
    )
    first, second, third = encode_rows(rows, tokenizer)
    assert first == second == third
    assert _supervised(first, tokenizer) == ["3<|im_end|>"]
    assert encode_rows(rows, tokenizer, template="chat") == [first, second, third]


def test_alpacas_template_is_the_published_one() -> None:
    tokenizer = _tokenizer(TEMPLATES["chatml"][0])
    rows = [ALPACA, {"prompt": "Add.", "completion": "3"}, {"messages": TALK[1:3]}]
    found = encode_rows(rows, tokenizer, template="alpaca")
    texts = [tokenizer.decode(row.ids) for row in found]
    assert texts[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n1 2\n\n### Response:\n3<|endoftext|>"
    )
    assert texts[1] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Response:\n3<|endoftext|>"
    )
    replies = ["3", "3", "Hello."]
    assert [_supervised(row, tokenizer) for row in found] == [[f"{reply}<|endoftext|>"] for reply in replies]
    # without a template of its own, a tokenizer gets the same
    assert encode_rows(rows, _tokenizer(None)) == found
    with pytest.raises(InputError, match="row 0: Alpaca's template takes one turn"):
        encode_rows([{"messages": TALK}], _tokenizer(None))


def test_braces_in_a_row_are_text() -> None:
    tokenizer = _tokenizer(None)
    (row,) = encode_rows([{"instruction": "{input} {0}", "output": "{x}"}], tokenizer)
    assert "### Instruction:\n{input} {0}\n\n### Response:\n{x}" in tokenizer.decode(row.ids)


def test_texts_count_everywhere_and_end_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = _tokenizer(TEMPLATES["chatml"][0])
    (plain,) = encode_rows([{"text": "ab"}], tokenizer)
    assert plain.labels == plain.ids
    assert tokenizer.decode(plain.ids) == "ab<|endoftext|>"
    # a tokenizer that frames what it reads: its beginning is kept, its end is not doubled
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[
            ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>")),
            ("<|endoftext|>", 0),
        ],
    )
    framed, answer = encode_rows([{"text": "ab"}, ALPACA], tokenizer, template="alpaca")
    assert tokenizer.decode(framed.ids) == "<|im_start|>ab<|endoftext|>"
    assert tokenizer.decode(answer.ids).count("<|endoftext|>") == 1
    assert _supervised(answer, tokenizer) == ["3<|endoftext|>"]


def test_texts_are_cut_anywhere_and_dialogues_at_the_end() -> None:
    ids = list(range(1, 8))
    assert Encoded(ids, ids, text=True).pieces(3) == [
        ([1, 2, 3],) * 2,
        ([4, 5, 6],) * 2,
    ]  # 7 has nothing before
    assert Encoded(ids, ids).pieces(3) == [([1, 2, 3],) * 2]
    late = Encoded(ids, [IGNORED] * 5 + [6, 7])
    assert late.pieces(5) == []
    assert late.pieces(6) == [(ids[:6], [IGNORED] * 5 + [6])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "llama"}, "template='llama': choose one of auto, alpaca, chat"),
        ({"supervise": "prompt"}, "supervise='prompt': choose one of response, all"),
        ({"template": "chat"}, "row 0: the tokenizer has no chat template"),
    ],
)
def test_bad_options_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_rows([ALPACA], _tokenizer(None), **options)


@pytest.mark.real
def test_a_real_tokenizers_chat(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    (row,) = encode_rows([{"messages": TALK[1:]}], tokenizer)
    assert _supervised(row, tokenizer) == ["Hello.<|im_end|>", "Again?<|im_end|>"]
    assert row.ids == tokenizer.apply_chat_template(TALK[1:], tokenize=True, return_dict=False)


def test_rows_are_encoded_as_they_are_asked_for():
    asked = []

    def rows():
        for number in range(3):
            asked.append(number)
            yield {"text": f"row {number}"}

    stream = stream_rows(rows(), _tokenizer(None))
    assert asked == []
    next(stream)
    assert asked == [0]
