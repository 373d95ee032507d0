"""One name for one module: adapters trained with another head on the same base model may name it with another prefix."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

Shapes = Mapping[str, tuple[int, int]]


def align_modules(adapters: Sequence[Shapes]) -> dict[str, str]:
    """Find short names of modules that others name in full: "h.0.attn.c_attn" for "transformer.h.0.attn.c_attn".

    A name is short for another one if it is its end after a dot, their shapes are equal, no third name of that shape
    qualifies as well (unless it is itself short for the same one), and no adapter uses both.

    Args:
        adapters: For each adapter, module name to (out_features, in_features).

    Returns:
        Short name to the full one; empty when all names agree.

    Example:
        >>> align_modules([{"h.0.mlp": (8, 4)}, {"transformer.h.0.mlp": (8, 4)}])
        {'h.0.mlp': 'transformer.h.0.mlp'}
    """
    seen: dict[tuple[str, tuple[int, int]], None] = {
        (name, shape): None for shapes in adapters for name, shape in shapes.items()
    }
    longer: dict[str, list[str]] = {}
    for name, shape in seen:
        for end in shorter_ends(name):
            if (end, shape) in seen:
                longer.setdefault(end, []).append(name)
    full = {name: [other for other in others if other not in longer] for name, others in longer.items()}
    aligned = {name: others[0] for name, others in full.items() if len(set(others)) == 1}
    return _without_clashes(aligned, adapters)


def shorter_ends(name: str) -> Iterator[str]:
    """Every shorter end of a dotted name, the longest first.

    Args:
        name: Such as "model.layers.0.q_proj".

    Examples:
        >>> list(shorter_ends("layers.0.q"))
        ['0.q', 'q']
    """
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(1, len(parts)))


def _without_clashes(aligned: Mapping[str, str], adapters: Iterable[Shapes]) -> dict[str, str]:
    clashing: set[str] = set()
    for shapes in adapters:
        owner: dict[str, str] = {}
        for name in shapes:
            target = aligned.get(name, name)
            if target in owner:
                clashing |= {target}
            owner[target] = name
    return {name: target for name, target in aligned.items() if target not in clashing}
