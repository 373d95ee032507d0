"""ReliabilityCurve against counting by hand, and on comparisons that were drawn with the probabilities they are given."""

import math

import pytest
import torch

from eigenpeft.linalg.preference.calibration import calibration


def test_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(500, generator=generator, dtype=torch.float64) * 2
    margins[7] = 0.0
    bins = {}
    for margin in margins.tolist():
        confidence = 1 / (1 + math.exp(-abs(margin)))
        right = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        bins.setdefault(min(3, int((confidence - 0.5) * 8)), []).append((confidence, right))
    found = calibration(margins, n_bins=4)
    expected = [tuple(map(sum, zip(*bins[i], strict=True))) for i in sorted(bins)]
    sizes = [len(bins[i]) for i in sorted(bins)]
    assert found.counts == tuple(sizes)
    assert found.confidence == pytest.approx([pair[0] / n for pair, n in zip(expected, sizes, strict=True)])
    assert found.accuracy == pytest.approx([pair[1] / n for pair, n in zip(expected, sizes, strict=True)])
    assert found.error == pytest.approx(sum(abs(pair[0] - pair[1]) for pair in expected) / 500)


@pytest.mark.parametrize(("sharpness", "low", "high"), [(1.0, 0.0, 0.01), (3.0, 0.1, 0.3)])
def test_honest_probabilities_are_calibrated_and_overconfident_ones_are_not(sharpness, low, high):
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(100_000, generator=generator)
    answered = torch.rand(100_000, generator=generator) < torch.sigmoid(true)
    margins = sharpness * torch.where(answered, true, -true)
    assert low <= calibration(margins).error < high


def test_only_what_was_asked_counts():
    margins = torch.tensor([1.0, -1.0, 1.0])
    assert calibration(margins, torch.tensor([True, False, True])).accuracy == (1.0,)
    with pytest.raises(ValueError, match="no comparisons"):
        calibration(margins, torch.zeros(3, dtype=torch.bool))
