"""What a user names (folders, parent folders, Hub ids) as folders on disk, each with a unique name."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from eigenpeft.collection.formats.keys import natural_order
from eigenpeft.collection.formats.other_tools import format_of_folder
from eigenpeft.collection.formats.settings import CONFIG_NAME
from eigenpeft.collection.formats.weights import BIN_NAME, SAFETENSORS_NAME

_HUB_FILES = (CONFIG_NAME, "adapter_model.*", "README.md")
_TRIALS = "trials.jsonl"  # beside the adapter in a result of `eigenpeft recycle`
_HUB_ID = re.compile(
    r"(?P<owner>[\w.-]+)/(?P<repo>[\w.-]+)(?:/(?P<subfolder>[\w.-]+(?:/[\w.-]+)*))?(?:@(?P<revision>\S+))?", re.ASCII
)


@dataclass(frozen=True)
class AdapterLocation:
    """One adapter's folder.

    Attributes:
        name: Label, unique in its collection; never used as a path.
        source: What was named: the folder, or the Hub id.
        folder: Where its files lie.
        revision: Commit of a Hub repository.
    """

    name: str
    source: str
    folder: Path
    revision: str | None = None


def locate(
    sources: str | Path | Sequence[str | Path],
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[list[AdapterLocation], list[str]]:
    """Find the adapters that are meant; those on the Hub are downloaded (config, weights and README alone).

    Args:
        sources: Adapter folders, folders of adapter folders, Hub ids "owner/name", "owner/name@revision" or
            "owner/name/subfolder", in any mix.
            What exists on disk is taken from disk. A folder that is named twice counts once.
        token: Token for the Hub.
        cache_dir: Download cache; the Hub's default.
        local_files_only: Use downloaded files only.

    Returns:
        The adapters in the order given, and one sentence for every source that cannot be found.
    """
    found: list[AdapterLocation] = []
    problems: list[str] = []
    for source in [sources] if isinstance(sources, str | Path) else sources:
        try:
            if source == "":
                raise ValueError("an empty name; pass a folder or a Hub id")
            if (path := Path(source).expanduser()).exists():
                found += _local(path, source=str(source))
            else:
                found.append(
                    _from_hub(str(source), token=token, cache_dir=cache_dir, local_files_only=local_files_only)
                )
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user.
            problems.append(f"{str(source)!r}: {error}")
    return _with_unique_names(_without_repeats(found)), problems


def _local(path: Path, *, source: str) -> list[AdapterLocation]:
    if not path.is_dir():
        raise ValueError(f"is a file; name the folder that holds {CONFIG_NAME}, here {str(path.parent)!r}")
    if _looks_like_adapter(path):
        return [AdapterLocation(_label(_name_of(path.resolve())), source, path)]
    children = sorted(
        (child for child in path.iterdir() if child.is_dir()), key=lambda child: natural_order(child.name)
    )
    found = [
        AdapterLocation(_label(_name_of(child)), str(Path(source) / child.name), child)
        for child in children
        if _looks_like_adapter(child) and not child.name.startswith(".")
    ]
    if not found and (other := format_of_folder(path)) is not None:
        raise ValueError(other)
    if not found and (path / _TRIALS).is_file():
        raise ValueError("is a run of `eigenpeft recycle` that was not finished: start that again, or leave it out")
    if not found:
        raise ValueError(f"has no {CONFIG_NAME}, neither in itself nor in a folder directly below it")
    return found


def _name_of(folder: Path) -> str:
    """What an adapter is called after: its folder, or for RESULT/adapter of `eigenpeft recycle` the folder RESULT."""
    is_result = folder.name == "adapter" and (folder.parent / _TRIALS).is_file()
    return folder.parent.resolve().name if is_result else folder.name


def _looks_like_adapter(folder: Path) -> bool:
    # Weights without a config count, so that the missing config is reported and not the adapter passed over.
    return any((folder / name).is_file() for name in (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME))


def _from_hub(
    source: str, *, token: str | bool | None, cache_dir: str | Path | None, local_files_only: bool
) -> AdapterLocation:
    match = _HUB_ID.fullmatch(source)
    subfolder = match["subfolder"] if match else None
    if match is None or source.startswith((".", "~")) or {".", ".."} & set((subfolder or "").split("/")):
        raise ValueError(
            "is neither a local folder nor a Hub id of the form 'owner/name', 'owner/name@revision' or, for an adapter in a "
            "subfolder of a repository, 'owner/name/subfolder'"
        )
    try:
        folder = snapshot_download(
            f"{match['owner']}/{match['repo']}",
            revision=match["revision"],
            allow_patterns=[f"{subfolder}/{name}" if subfolder else name for name in _HUB_FILES],
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"is not a local folder, and could not be downloaded from the Hub ({type(error).__name__}: {reason})"
        ) from error
    found = Path(folder, subfolder) if subfolder else Path(folder)
    if not _looks_like_adapter(found):
        raise ValueError(
            f"was found on the Hub, but has no {CONFIG_NAME} there; if its adapters are in subfolders, name one: "
            f"'{match['owner']}/{match['repo']}/subfolder'"
        )
    return AdapterLocation(
        _label(found.name if subfolder else match["repo"]), source, found, revision=Path(folder).name
    )


def _label(name: str) -> str:
    """A name as a label: printable, no separators, so that nothing downstream can take it for a path."""
    kept = "".join(char if char.isprintable() and char not in "/\\:" else "_" for char in name)
    return kept.strip(". ") or "adapter"


def _without_repeats(found: Iterable[AdapterLocation]) -> list[AdapterLocation]:
    kept: dict[Path, AdapterLocation] = {}
    for location in found:
        kept.setdefault(location.folder.resolve(), location)
    return list(kept.values())


def _with_unique_names(found: Sequence[AdapterLocation]) -> list[AdapterLocation]:
    """Namesakes get their parent's name in front ("run1--checkpoint-500"), and a number if that is not enough."""
    counts = Counter(location.name for location in found)
    taken = {name for name, count in counts.items() if count == 1}
    unique = []
    for location in found:
        name = location.name
        if counts[name] > 1:
            name = stem = f"{_label(_parent(location))}--{name}"
            number = 2
            while name in taken:
                name, number = f"{stem}-{number}", number + 1
            taken.add(name)
        unique.append(replace(location, name=name))
    return unique


def _parent(location: AdapterLocation) -> str:
    return location.source.partition("/")[0] if location.revision else location.folder.resolve().parent.name
