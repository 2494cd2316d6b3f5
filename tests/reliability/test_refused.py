"""More input that must be taken whole or refused in one line: claims files, weights, sizes, strange models.

Three properties times the profile's examples, beside those of test_fuzz.py.
"""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from preln import cli
from preln.base.errors import InputError
from preln.data import load_tokens
from preln.models import load_model, tiny_model, tiny_tokenizer
from preln.probe import probe
from preln.testing.verify import verify

pytestmark = pytest.mark.integration
QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SIZE = ("--sequences", "2", "--length", "16")
TEXTS = "\n".join(
    json.dumps({"text": f"block {i} writes its update {i * i} to the stream. " * 8}) for i in range(60)
)


def refusal(call, *args, **kwargs):
    """The one line that refuses a call, or None; anything but a result or such a line is an error."""
    try:
        call(*args, **kwargs)
    except InputError as error:
        text = str(error)
        assert text.strip() and len(text.splitlines()) == 1
        return text
    return None


def told(*words):
    """Exit code and lines on stderr of a command."""
    errors = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
    return code, errors.getvalue().strip().splitlines()


def refused(*words, culprit):
    """Whether a command exits with 2 and one line that names the culprit."""
    code, lines = told(*words)
    return code == 2 and len(lines) == 1 and culprit in lines[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text(TEXTS, encoding="utf-8")
    return str(path)


# Claims files

BODIES = (
    "[Evidence('smt', 'pass')]",
    "[Evidence('property', 'pass', {'n': 3})]",
    "[]",
    "None",
    "1 / 0",
    "f()",
    "[1, 'proved']",
    "[Evidence('smt', 'maybe')]",
    "[Evidence('guess', 'pass')]",
    "[Evidence('smt', 'pass', 5)]",
    "[Evidence('smt', 'pass', {'x': {1}})]",
    "[Evidence('smt', 'pass', {'x': float('inf')})]",
    "[Evidence('smt', 'pass', {('a', 1): 2})]",
    "[Evidence('smt', 'pass', {'negative_controls': [1]})]",
    "[Evidence('smt', 'pass', {'negative_controls': [{'name': 'a', 'rejected': 'yes'}]})]",
    "exit(3)",
)
FIELDS = ("title", "statement", "kind", "assumptions", "uses", "source", "expect")
plain = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(max_size=6)
    | st.lists(st.integers(0, 3) | st.text(max_size=3), max_size=2)
    | st.sampled_from(["theorem", "hypothesis", "proved", "untested", ["LN-NORM"], "MINE", ["MINE"]])
)


@st.composite
def claims_files(draw):
    """A file that registers one claim, as a rule called MINE, with up to three fields that are anything."""
    fields = {"title": "t", "statement": "s"} | draw(
        st.dictionaries(st.sampled_from(FIELDS), plain, max_size=3)
    )
    name = draw(st.just("MINE") | st.just("MINE") | plain)
    told = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    lines = [
        draw(
            st.sampled_from(["", "", "", "import nowhere", "exit(2)", "raise KeyError('x')", "x = = 1", "\0"])
        ),
        "from preln.theory import Evidence, claim",
        f"@claim({name!r}, {told})",
        "def f():",
        f"    return {draw(st.sampled_from(BODIES))}",
    ]
    return "\n".join(lines).encode("utf-8", "surrogatepass") + draw(st.just(b"") | st.just(b"# \xff\n"))


@QUIET
@given(content=claims_files())
def test_a_claims_file_is_decided_or_refused(content, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    decided = []
    with redirect_stderr(io.StringIO()):
        line = refusal(lambda: decided.append(verify(["MINE"], ledgers=[path])))
    assert line is None or "mine.py" in line or "claim" in line
    for ledger in decided:
        assert ledger.table() and ledger.family_table() is not None
        json.dumps(ledger.to_json(), allow_nan=False)


def test_not_every_claims_file_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    head = "from preln.theory import Evidence, claim\n@claim('MINE', title='t', statement='s')\n"
    path.write_text(f"{head}def f():\n    return {BODIES[0]}\n")
    assert verify(["MINE"], ledgers=[path]).claims["MINE"].status == "proved"
    path.write_text(path.read_text().replace("'t'", "5"))
    assert "title" in refusal(verify, ["MINE"], ledgers=[path])


# Weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    tiny_model("llama", blocks=2).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@QUIET
@given(data=st.data())
def test_a_weight_that_is_not_finite_is_named(data, folder, tmp_path_factory):
    own = tmp_path_factory.mktemp("own") / "w"
    own.mkdir()
    for path in folder.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    weights = load_file(own / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(weights)))
    flat = weights[name].view(-1)
    place = data.draw(st.integers(0, len(flat) - 1))
    flat[place] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    line = refusal(load_model, str(own))
    assert line is not None and name in line and "w: " in line


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_configuration_beyond_its_weights_is_refused(folder, tmp_path, field):
    own = tmp_path / "w"
    own.mkdir()
    for path in folder.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {field: 2 * config[field]}))
    line = refusal(load_model, str(own))
    assert line is not None and str(own) in line


# Sizes


@QUIET
@given(
    sequences=st.sampled_from([-1, 0, 1, 2, 10**9]) | st.integers(1, 4),
    length=st.sampled_from([-1, 0, 1, 2, 63, 64, 65, 300, 10**9]) | st.integers(2, 40),
)
def test_a_size_is_measured_or_refused(sequences, length, corpus, learned):
    model, tokenizer = learned

    def call():
        tokens = load_tokens(corpus, tokenizer, sequences=sequences, length=length)
        return probe(model, tokens, measures=["residual_rms"], bootstrap=0)

    line = refusal(call)
    assert (line is None) == (sequences in range(1, 5) and 2 <= length <= 64), line


@pytest.fixture(scope="module")
def learned():
    """A model with 64 learned positions."""
    config = GPT2Config(n_embd=4, n_head=1, n_layer=1, n_inner=4, n_positions=64, vocab_size=512)
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval(), tiny_tokenizer()


# Strange models


def saved(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def narrow(**values):
    """A Llama of two blocks and as many numbers in its stream as asked for."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    return LlamaForCausalLM(LlamaConfig(intermediate_size=3, vocab_size=512, **shape, **values)).eval()


def test_a_stream_of_one_number_is_measured_pruned_and_healed(tmp_path, corpus):
    model = saved(tmp_path / "narrow", narrow(hidden_size=1))
    data = ("--data", corpus, *SIZE)
    assert told("probe", model, *data) == (0, [])
    assert told("score", model, *data, "--metrics", "reverse,block_influence") == (0, [])
    assert told("prune", model, "--layers", "1", "--out", tmp_path / "small")[0] == 0
    assert told("heal", model, "--recipe", "head", "--steps", "1", *data, "--out", tmp_path / "h")[0] == 0


def test_a_model_of_one_block_is_measured_and_keeps_it(tmp_path, corpus):
    data = ("--data", corpus, *SIZE)
    assert told("probe", "tiny:llama:1", *data) == (0, [])
    assert told("score", "tiny:llama:1", *data, "--metrics", "reverse,perplexity")[0] == 0
    out = ("--out", tmp_path / "small")
    assert refused("prune", "tiny:llama:1", "--layers", "0", *out, culprit="all 1 blocks")
    assert refused("prune", "tiny:llama:1", "--metric", "reverse", "--drop", "1", *out, culprit="--drop 1")
    assert refused("heal", "tiny:llama:1", "--recipe", "partial-2", *data, *out, culprit="partial-2")
    assert not (tmp_path / "small").exists()


def test_an_encoder_decoder_is_refused(tmp_path, corpus):
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1, vocab_size=512)
    model = saved(tmp_path / "t5", T5ForConditionalGeneration(config))
    assert refused("probe", model, "--data", corpus, *SIZE, culprit="encoder-decoder")


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path, corpus):
    model = narrow(hidden_size=2)
    model.resize_token_embeddings(100)
    assert refused("probe", saved(tmp_path / "m", model), "--data", corpus, *SIZE, culprit="not a pair")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"caf\xe9 \xff\n" * 50, b'{"text": "a"}\n'])
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_text_that_cannot_be_used_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    assert refused("probe", "tiny:llama", "--data", path, *SIZE, culprit=f"data.{suffix}")
