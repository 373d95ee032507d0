"""Opening one adapter: config and header are read and held against each other."""

from collections.abc import Iterable, Mapping

from eigenpeft.collection.adapter import FactorLocation, OpenAdapter, SourceAdapter
from eigenpeft.collection.formats.keys import ParsedKey, natural_order, parse_key
from eigenpeft.collection.formats.other_tools import format_of_keys
from eigenpeft.collection.formats.settings import LoraSettings, license_of, read_settings
from eigenpeft.collection.formats.weights import WeightsFile, open_weights
from eigenpeft.collection.sources import AdapterLocation

# The longest module names of real models have about 150.
MAX_NAME_LENGTH = 1_000


def open_adapter(location: AdapterLocation, *, embeddings: bool = False) -> tuple[OpenAdapter | None, list[str]]:
    """Read config and header of one adapter and check that they agree.

    Args:
        location: Its folder and name.
        embeddings: Take the factors of embeddings too.

    Returns:
        The adapter, None when there are problems; and the problems, one sentence each.
    """
    settings, problems = read_settings(location.folder)
    weights: WeightsFile | None = None
    try:
        weights = open_weights(location.folder)
    except ValueError as error:
        problems.append(str(error))
    if settings is None or weights is None:
        return None, _sentences(location, problems)
    if problems := _problems_of_names(weights.shapes):
        return None, _sentences(location, problems)
    parsed = {key: parse_key(key, embeddings=embeddings) for key in weights.shapes}
    try:
        factors, problems = _locate_factors(parsed, weights, settings)
    except ValueError as error:  # patterns without end
        return None, _sentences(location, [f"has {error}"])
    problems = _problems_of_keys(parsed) or problems
    if problems:
        return None, _sentences(location, problems)
    used = {key for found in factors.values() for key in (found.key_A, found.key_B)}
    info = SourceAdapter(
        name=location.name,
        source=location.source,
        revision=location.revision,
        base_model=settings.base_model,
        rank=max(weights.shapes[found.key_A][0] for found in factors.values()),
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        task_type=settings.task_type,
        license=license_of(location.folder),
        modules=tuple(sorted(factors, key=natural_order)),
        kept_aside=tuple(sorted(set(weights.shapes) - used, key=natural_order)),
        weights_path=str(weights.path),
        weights_stamp=weights.stamp,
        base_model_revision=settings.base_model_revision,
    )
    return OpenAdapter(info, weights, factors, settings.fan_in_fan_out, unknown_fields=settings.unknown_fields), []


def some(names: Iterable[str], *, limit: int = 3) -> str:
    """The first few names, quoted, and how many more there are.

    Args:
        names: All of them.
        limit: How many to show.
    """
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + rest


def _sentences(location: AdapterLocation, clauses: Iterable[str]) -> list[str]:
    where = f" (from {location.source!r})" if location.source != location.name else ""
    return [f"Adapter {location.name!r}{where} {clause}." for clause in clauses]


def _problems_of_names(names: Iterable[str]) -> list[str]:
    long = [name for name in names if len(name) > MAX_NAME_LENGTH]
    if not long:
        return []
    return [
        f"has {len(long)} tensors whose names are longer than {MAX_NAME_LENGTH} characters, such as {long[0][:60]!r}... of "
        f"{len(long[0])}; no model has such modules, leave it out"
    ]


def _problems_of_keys(parsed: Mapping[str, ParsedKey]) -> list[str]:
    adapted = {part.module for part in parsed.values() if part.kind == "factor"}
    foreign = [
        key
        for key, part in parsed.items()
        if part.kind == "foreign" or (part.kind == "doubtful" and part.module in adapted)
    ]
    if (found := format_of_keys(parsed)) is not None:
        return [found]
    if foreign:
        return [
            f"has {len(foreign)} LoRA tensors that plain LoRA does not have, {some(foreign)}: its update is not s B A; "
            "leave it out"
        ]
    if not any(part.kind == "factor" for part in parsed.values()):
        holds = f", only {some(parsed)}" if parsed else ""
        return [f"has no lora_A and lora_B tensors among the {len(parsed)} of its weights file{holds}; leave it out"]
    inner = sorted({str(part.adapter) for part in parsed.values() if part.adapter})
    if len(inner) > 1:
        return [f"has the factors of {len(inner)} adapters in one file, {some(inner)}; save each into its own folder"]
    return []


def _locate_factors(
    parsed: Mapping[str, ParsedKey], weights: WeightsFile, settings: LoraSettings
) -> tuple[dict[str, FactorLocation], list[str]]:
    pairs: dict[str, dict[str, str]] = {}
    complaints: dict[str, list[str]] = {}
    for key, part in parsed.items():
        if part.kind == "factor":
            if part.factor in pairs.setdefault(part.module, {}):
                complaints.setdefault(f"stores lora_{part.factor} twice", []).append(part.module)
            pairs[part.module][part.factor] = key
    found: dict[str, FactorLocation] = {}
    for module, keys in pairs.items():
        complaint = _complaint(keys, weights, expected_rank=settings.rank_of(module))
        if complaint:
            complaints.setdefault(complaint, []).append(module)
            continue
        shape = (weights.shapes[keys["B"]][0], weights.shapes[keys["A"]][1])
        found[module] = FactorLocation(keys["A"], keys["B"], shape, scaling=settings.scaling_of(module))
    return found, [f"{what}, in {some(sorted(where, key=natural_order))}" for what, where in complaints.items()]


def _complaint(keys: Mapping[str, str], weights: WeightsFile, *, expected_rank: int) -> str | None:
    """What is wrong with the factors of one module, in words that are the same for all modules with that fault."""
    if len(keys) == 1:
        present, absent = ("A", "B") if "A" in keys else ("B", "A")
        return f"has lora_{present} without lora_{absent}; save it again, or leave it out"
    shape_A, shape_B = weights.shapes[keys["A"]], weights.shapes[keys["B"]]
    if weights.not_float & set(keys.values()):
        return "has factors that are not floating-point numbers; save it unquantised"
    if 0 in (*shape_A, *shape_B) or min(len(shape_A), len(shape_B)) < 2:
        return (
            f"has factors of shapes {shape_A} and {shape_B}, which were not gathered from a sharded run before saving; "
            "save it again"
        )
    if max(len(shape_A), len(shape_B)) > 2:
        return (
            f"has convolution factors of shapes {shape_A} and {shape_B}; only matrices are supported, so leave the "
            "adapter out, or train one without those modules"
        )
    if shape_A[0] != shape_B[1]:
        return f"has lora_A of rank {shape_A[0]} and lora_B of rank {shape_B[1]}; download it again, or leave it out"
    if shape_A[0] != expected_rank:
        return (
            f"has factors of rank {shape_A[0]} where its config says {expected_rank}, so that its scaling is unknown; "
            "correct r or rank_pattern in its config"
        )
    return None
