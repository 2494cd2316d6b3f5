"""From rows of text to token ids: Alpaca's template, the tokenizer's own, and what of them is supervised.

In the form of a chat, the supervised tokens of a turn are those that the model itself would write after its
generation prompt, through the token that ends the turn. They are found from the template's output, not from a
list of known templates: the conversation up to the turn, with the generation prompt, must be a prefix of the
whole, in characters and in tokens, and a marker in place of the reply shows what the template puts before it.
Where one of these does not hold the row is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from preln.base.errors import InputError
from preln.base.progress import track
from preln.data import checked_row

IGNORED = -100
TEMPLATES = ("auto", "alpaca", "chat")
SUPERVISE = ("response", "all")

# The template of Stanford Alpaca (Taori et al. 2023), which the published healing runs use.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_MARKER = "Qx7mark7xQ"
# Some templates write today's date unless they are given one: a row would change its ids at midnight.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Encoded:
    """One row as tokens.

    Attributes:
        ids: Token ids.
        labels: The ids that count in the loss, ``IGNORED`` elsewhere; as long as ``ids``.
        text: Whether the row is plain text, which may be cut anywhere.
    """

    ids: list[int]
    labels: list[int]
    text: bool = False

    def pieces(self, length: int) -> list[tuple[list[int], list[int]]]:
        """At most ``length`` ids and labels each: consecutive pieces of a text, or the start of a dialogue.

        A piece in which nothing is predicted (its first token never is) is left out.
        """
        starts = range(0, len(self.ids), length) if self.text else (0,)
        cut = [(self.ids[i : i + length], self.labels[i : i + length]) for i in starts]
        return [(ids, labels) for ids, labels in cut if any(label != IGNORED for label in labels[1:])]


def encode_rows(
    rows: Iterable[Any],
    tokenizer: Any,
    *,
    template: str = "auto",
    supervise: str = "response",
    name: str = "training data",
) -> Iterator[Encoded]:
    """Rows of any form that :func:`preln.data.load_rows` knows, as tokens, one by one as they are asked for.

    A text is ended by the end-of-sequence token and supervised everywhere. Every other form becomes a
    conversation (an Alpaca row's user says the instruction and, after a blank line, the input). Alpaca's
    template takes one question and its answer, which the end-of-sequence token ends.

    Args:
        rows: Dictionaries.
        tokenizer: A tokenizer of transformers.
        template: ``"alpaca"``; ``"chat"``, the tokenizer's own; or ``"auto"``: the tokenizer's own where it
            has one, or else Alpaca's.
        supervise: ``"response"``, the assistant's turns alone, or ``"all"``.
        name: What the data are called in an error.

    Raises:
        InputError: An unknown option; a row of no known form; a template that the tokenizer does not have, or
            in which the assistant's tokens cannot be told from the others.
    """
    if template not in TEMPLATES:
        raise InputError(f"template={template!r}: choose one of {', '.join(TEMPLATES)}")
    if supervise not in SUPERVISE:
        raise InputError(f"supervise={supervise!r}: choose one of {', '.join(SUPERVISE)}")
    own = getattr(tokenizer, "chat_template", None) is not None
    if template == "auto":
        template = "chat" if own else "alpaca"
    added = frozenset(getattr(tokenizer, "added_tokens_decoder", ())) | frozenset(tokenizer.all_special_ids)

    def encoded(raw: Any, where: str) -> Encoded:
        row = checked_row(raw, where)
        if "text" in row:
            ids = _with_begin(tokenizer, row["text"]) + _end(tokenizer)
            return Encoded(ids, ids, text=True)
        if template == "alpaca":
            ids, labels = _alpaca(row, tokenizer, where)
        elif own:
            ids, labels = _chat(_messages(row), tokenizer, added, where)
        else:
            raise InputError(f"{where}: the tokenizer has no chat template: use template='alpaca'")
        return Encoded(ids, labels if supervise == "response" else ids)

    return (encoded(raw, f"{name}, row {index}") for index, raw in enumerate(track(rows, label="encode")))


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _plain(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a row beyond the model's context is no mistake, it is cut later
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _with_begin(tokenizer: Any, text: str) -> list[int]:
    """Ids with what the tokenizer itself puts in front, but without an end that it puts behind."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    end = _end(tokenizer)
    if end and ids[-1:] == end and _plain(tokenizer, text)[-1:] != end:
        return ids[:-1]
    return ids


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """A row as a conversation."""
    if "messages" in row:
        return row["messages"]
    if "prompt" in row:
        question, answer = row["prompt"], row["completion"]
    else:
        question = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        answer = row["output"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca(row: dict[str, Any], tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a row in Alpaca's template."""
    if "instruction" in row:
        instruction, extra, output = row["instruction"], row["input"], row["output"]
    else:
        messages = _messages(row)
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise InputError(
                f"{where}: Alpaca's template takes one turn of 'user' and one of 'assistant': use a "
                "tokenizer with a chat template"
            )
        instruction, extra, output = messages[0]["content"], "", messages[1]["content"]
    template = _WITH_INPUT if extra else _WITHOUT_INPUT
    prompt = _with_begin(tokenizer, template.format(instruction=instruction, input=extra))
    response = _plain(tokenizer, output) + _end(tokenizer)
    return prompt + response, [IGNORED] * len(prompt) + response


def _chat(
    messages: list[dict[str, str]], tokenizer: Any, added: frozenset[int], where: str
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation in the tokenizer's own template."""
    whole = _render(tokenizer, messages, where)
    ids = _plain(tokenizer, whole)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            begin, end = _span(messages, turn, whole, ids, tokenizer, added, where)
            labels[begin:end] = ids[begin:end]
    return ids, labels


def _render(tokenizer: Any, messages: list[dict[str, str]], where: str, *, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, date_string=_DATE
        )
    except Exception as error:  # a template raises what it likes, and jinja2 its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{where}: the chat template refuses it ({reason}): mend its messages, or use template='alpaca'"
        ) from error


def _span(
    messages: list[dict[str, str]],
    turn: int,
    whole: str,
    ids: list[int],
    tokenizer: Any,
    added: frozenset[int],
    where: str,
) -> tuple[int, int]:
    """The half-open range of ids that the assistant writes in a turn, its end-of-turn token included."""

    def refused(reason: str) -> InputError:
        return InputError(
            f"{where}: message {turn}: {reason}, so what to supervise cannot be told: mend the row, or use "
            "template='alpaca' or supervise='all'"
        )

    content = messages[turn]["content"]
    before = _render(tokenizer, messages[:turn], where, prompt=True)
    marker = [*messages[:turn], {"role": "assistant", "content": _MARKER}, *messages[turn + 1 :]]
    lead, found, _ = _render(tokenizer, marker, where).partition(_MARKER)
    if not whole.startswith(before) or not lead.startswith(before):
        raise refused("the chat template's generation prompt is not how its assistant's turn begins")
    bodies = (body for body in (content, content.strip()) if whole.startswith(lead + body))
    body = next(bodies, None) if found else None
    if body is None:
        raise refused("the chat template rewrites the reply")
    head, upto = _plain(tokenizer, before), _plain(tokenizer, lead + body)
    if ids[: len(head)] != head:
        raise refused("the tokenizer joins the reply's first characters with the generation prompt's last")
    # white space behind the reply may have joined its last token
    joined = ids[: len(upto)] != upto
    start = max(len(upto) - joined, len(head))
    end = next((place for place in range(start, len(ids)) if ids[place] in added), None)
    if end is None:
        raise refused("the chat template ends the reply with no token of its own")
    written, wanted = (tokenizer.decode(part).strip() for part in (ids[len(head) : end], upto[len(head) :]))
    if written != wanted:
        raise refused("the chat template writes more behind the reply than an end-of-turn token")
    return len(head), end + 1
