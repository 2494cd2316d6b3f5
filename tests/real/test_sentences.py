"""The packaged sentence model: loads without pickle, and tells what texts mean."""

import pytest

from preln.base.errors import InputError
from preln.evaluate.sentences import cosine_similarities, load_sentence_encoder, sentence_folder

pytestmark = pytest.mark.real


def test_it_knows_a_paraphrase_from_another_subject():
    try:
        folder = sentence_folder()
    except InputError as error:
        pytest.skip(f"the sentence model cannot be fetched here: {error}")
    assert not [p for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pkl", ".pickle"}]
    encoder = load_sentence_encoder()
    first = encoder.embed(["A man is playing a guitar.", "The cat sleeps on the sofa."])
    second = encoder.embed(["Someone plays the guitar.", "A kitten is napping on a couch."])
    assert first.shape == (2, 384)
    alike, crossed = cosine_similarities(first, second), cosine_similarities(first, second.flip(0))
    assert (alike > 0.5).all()
    assert (crossed < 0.3).all()
