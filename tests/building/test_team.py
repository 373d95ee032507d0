"""Sharing work out: every piece once, nearly equal loads, the same in every process."""

import pytest

from eigenpeft.building import team
from eigenpeft.building.team import Team, launched, module_cost, share_out
from eigenpeft.errors import LostProcessError


@pytest.mark.parametrize("n_parts", [1, 2, 3, 20])
def test_every_piece_goes_to_one_part_and_loads_are_within_grahams_bound(n_parts):
    costs = {f"layer.{i}": float(1 + (7 * i) % 11) for i in range(16)}
    parts = share_out(costs, n_parts)
    assert len(parts) == n_parts
    assert sorted(name for part in parts for name in part) == sorted(costs)
    loads = [sum(costs[name] for name in part) for part in parts]
    best = max(sum(costs.values()) / n_parts, max(costs.values()))
    assert max(loads) <= 4 / 3 * best
    for part in parts:  # in the order given
        assert part == [name for name in costs if name in part]


def test_equal_modules_are_shared_equally():
    costs = {f"layer.{i}.{name}": module_cost(8000, (4096, 4096)) for i in range(4) for name in "qkvo"}
    assert [len(part) for part in share_out(costs, 2)] == [8, 8]


def test_alone_there_is_nobody_to_wait_for(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not launched()
    team = Team.of_this_launch()
    assert (team.size, team.rank, team.is_main) == (1, 0, True)
    assert team.part({"a": 1.0, "b": 2.0}) == ["a", "b"]
    assert team.gather([1, 2], doing="testing") == [1, 2]


def test_a_lost_process_is_one_clear_error(monkeypatch):
    def broken(values):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer\nmore")

    monkeypatch.setattr(team, "gather_object", broken)
    alone = Team()
    alone.size = 2
    with pytest.raises(
        LostProcessError, match=r"Another of the 2 processes ended while fitting .*Connection closed by peer\)"
    ):
        alone.gather([], doing="fitting")
