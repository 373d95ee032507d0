"""Prototypes beside their definitions, number by number, in NumPy."""

import numpy as np
import pytest
import torch

from eigenpeft.linalg.scores.prototypes import class_means, complete_prototypes, prototype_logits


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def test_completion_is_that_of_the_definition():
    old, new, own = draw(3, 5, seed=0), draw(4, 5, seed=1), draw(4, 7, seed=2)
    expected = np.zeros((3, 7))
    for i in range(3):
        weights = np.exp([cosine(old[i], new[j]) for j in range(4)])
        for j in range(4):
            expected[i] += weights[j] / weights.sum() * own[j]
    found = complete_prototypes(*map(torch.from_numpy, (old, new, own)))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    scaled = complete_prototypes(*map(torch.from_numpy, (3 * old, 0.2 * new, own)))
    np.testing.assert_allclose(scaled.numpy(), expected, atol=1e-12)


def test_logits_are_weighted_cosines():
    features, prototypes = [draw(4, 5, seed=3), draw(4, 2, seed=4)], [draw(3, 5, seed=5), draw(3, 2, seed=6)]
    owners = [0, 1, 1]
    found = prototype_logits(
        [*map(torch.from_numpy, features)], [*map(torch.from_numpy, prototypes)], torch.tensor(owners), weight=0.3
    )
    for row in range(4):
        for c in range(3):
            parts = [(1.0 if t == owners[c] else 0.3) * cosine(features[t][row], prototypes[t][c]) for t in range(2)]
            assert float(found[row, c]) == pytest.approx(sum(parts), abs=1e-12)


def test_means_are_by_class():
    features, labels = draw(7, 3, seed=7), np.array([1, 0, 1, 2, 2, 2, 0])
    found = class_means(torch.from_numpy(features), torch.from_numpy(labels), n_classes=3)
    np.testing.assert_allclose(found.numpy(), np.stack([features[labels == c].mean(0) for c in range(3)]), atol=1e-12)
    with pytest.raises(ValueError, match="class 3 of 4 has no rows .* pass one or more of each"):
        class_means(torch.from_numpy(features), torch.from_numpy(labels), n_classes=4)
    with pytest.raises(ValueError, match="labels from 0 to 2 must be from 0 to 1"):
        class_means(torch.from_numpy(features), torch.from_numpy(labels), n_classes=2)
    with pytest.raises(ValueError, match="no new classes"):
        complete_prototypes(torch.ones(1, 2), torch.ones(0, 2), torch.ones(0, 2))
