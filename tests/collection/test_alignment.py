"""Alignment of module names between adapters with different prefixes."""

import pytest

from eigenpeft.collection.alignment import align_modules

S, T = (8, 4), (4, 8)


@pytest.mark.parametrize(
    ("adapters", "aligned"),
    [
        ([], {}),
        ([{"h.0.mlp": S}], {}),
        ([{"h.0.mlp": S}, {"h.0.mlp": S}], {}),
        ([{"h.0.mlp": S}, {"transformer.h.0.mlp": S}], {"h.0.mlp": "transformer.h.0.mlp"}),
        # A chain of prefixes ends in the longest name.
        (
            [{"0.q": S}, {"layers.0.q": S}, {"model.layers.0.q": S}],
            {"0.q": "model.layers.0.q", "layers.0.q": "model.layers.0.q"},
        ),
        # The end must start after a dot.
        ([{"proj": S}, {"layer.c_proj": S}], {}),
        # Another shape is another module.
        ([{"h.0.mlp": T}, {"transformer.h.0.mlp": S}], {}),
        # Two full names fit: which one is meant is not known.
        ([{"layers.0.q": S}, {"text.layers.0.q": S, "vision.layers.0.q": S}], {}),
        # Two full names fit, of which only one has the shape.
        ([{"layers.0.q": S}, {"text.layers.0.q": S, "vision.layers.0.q": T}], {"layers.0.q": "text.layers.0.q"}),
        # An adapter that has both says itself that they are two modules.
        ([{"layers.0.q": S, "draft.layers.0.q": S}, {"draft.layers.0.q": S}], {}),
        ([{"layers.0.q": S, "draft.layers.0.q": S}, {"layers.0.q": S}], {}),
    ],
)
def test_align_modules(adapters, aligned):
    assert align_modules(adapters) == aligned


def test_order_of_the_adapters_does_not_matter():
    adapters = [{"0.q": S, "x": T}, {"layers.0.q": S}, {"model.layers.0.q": S, "head.x": T}]
    assert align_modules(adapters) == align_modules(adapters[::-1])
