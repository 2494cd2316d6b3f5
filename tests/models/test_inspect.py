"""An anatomy is measured once for a model, and again when the model is another."""

import gc
import weakref

import torch

import preln.models.inspect as inspect
from preln.models import anatomy, tiny_model


def test_a_model_is_measured_once_until_it_changes(monkeypatch):
    measured, plain = [], inspect._measure
    monkeypatch.setattr(inspect, "_measure", lambda model: measured.append(1) or plain(model))
    model = tiny_model("llama")
    first, again = anatomy(model), anatomy(model)
    assert len(measured) == 1 and again == first and again is not first
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2.0)
    anatomy(model)
    assert len(measured) == 2
    model.model.layers[2] = tiny_model("llama", seed=1).model.layers[2]
    assert anatomy(model).blocks[2] is model.model.layers[2]
    assert len(measured) == 3
    model.model.layers[0].register_forward_hook(lambda *_: None)
    anatomy(model)
    assert len(measured) == 4
    # what is remembered does not keep a model alive
    alive = weakref.ref(model)
    del model, first, again
    gc.collect()
    assert alive() is None
