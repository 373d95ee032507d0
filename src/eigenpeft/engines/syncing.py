"""The members of a store as adapters of a running server, by the server's own endpoints for loading and unloading."""

import json
import logging
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eigenpeft.engines.catalog import StoreCatalog
from eigenpeft.engines.resolver import VLLM_RANKS
from eigenpeft.errors import EigenPeftError
from eigenpeft.tuners.files.lora_files import write_lora

# Paths of (loading, unloading), the newest first: vLLM (needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1) and SGLang.
ENDPOINTS = (
    ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    ("/load_lora_adapter", "/unload_lora_adapter"),
)
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SyncReport:
    """What a synchronisation did, by the names that requests use (`STORE/MEMBER`).

    Attributes:
        loaded: Loaded now; those that had changed were unloaded before.
        kept: Loaded already, and as they are in the store.
        unloaded: No longer in the store.
        failed: Name to what the server answered.
    """

    loaded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def sync_adapters(
    server: str,
    *,
    store: str | Path,
    out_dir: str | Path,
    names: Sequence[str] | None = None,
    timeout: float = 120.0,
) -> SyncReport:
    """Make a server's adapters those of a store: load the missing and the changed, unload those that have gone.

    For vLLM and SGLang, which know the same two requests under different paths. Adapters of the server whose names do not
    begin with the store's are left alone. A name that fails does not stop the others.

    Args:
        server: Address, such as http://localhost:8000.
        store: Folder or Hub id of a store.
        out_dir: Where plain LoRA folders are written; the server must see it under the same path. Folders of members that
            have gone are removed from it.
        names: Which members; None takes all.
        timeout: Seconds to wait for an answer.

    Raises:
        EigenPeftError: If `server` is no address, does not answer, or has no endpoints for loading adapters.
        SubspaceNotFoundError: If there is no store.
        KeyError: If the store has no such member.

    Examples:
        Not run with the tests, because a server is needed:

        >>> from eigenpeft.engines import sync_adapters
        >>> report = sync_adapters(  # doctest: +SKIP
        ...     "http://localhost:8000", store="my-store", out_dir="/srv/adapters"
        ... )
        >>> report.loaded, report.failed  # doctest: +SKIP
        (['my-store/legal', 'my-store/sports'], {})
    """
    catalog = StoreCatalog([store])
    (label,) = catalog.labels
    wanted = list(catalog.names(label) if names is None else names)
    folder = Path(out_dir).resolve() / label.replace("/", "--")
    client = AdapterEndpoints(server, timeout)
    there = client.adapters(f"{label}/")
    report = SyncReport()
    used = set()
    for member in wanted:
        name = f"{label}/{member}"
        path = folder / _written(catalog, name, folder)
        used.add(path)
        if there.get(name) == str(path):
            report.kept.append(name)
            continue
        answer = client.unload(name) if name in there else None
        answer = answer or client.load(name, path)
        if answer is None:
            report.loaded.append(name)
        else:
            report.failed[name] = answer
    for name in there.keys() - {f"{label}/{member}" for member in wanted}:
        answer = client.unload(name)
        if answer is None:
            report.unloaded.append(name)
        else:
            report.failed[name] = answer
            used.add(Path(there[name]))
    for path in folder.iterdir() if folder.is_dir() else ():
        if path not in used and (path / "adapter_config.json").is_file():
            shutil.rmtree(path, ignore_errors=True)
    return report


def _written(catalog: StoreCatalog, name: str, folder: Path) -> str:
    """Name of the folder of a member; another one after it was replaced, so that servers see a new path."""
    adapter = catalog.find(name)
    rank = min((rank for rank in VLLM_RANKS if rank >= adapter.rank), default=adapter.rank)
    key = f"{adapter.key}-r{rank}"
    if not (folder / key / "adapter_config.json").is_file():
        updates, fields, others = catalog.contents(adapter)
        write_lora(folder / key, updates=updates, fields=fields, others=others, rank=rank)
    return key


class AdapterEndpoints:
    """The few requests that loading takes.

    Args:
        server: Address, such as http://localhost:8000.
        timeout: Seconds to wait for an answer.

    Raises:
        EigenPeftError: If the server does not answer, or has no endpoints for loading adapters.
    """

    def __init__(self, server: str, timeout: float = 120.0):
        if not server.startswith(("http://", "https://")):
            raise EigenPeftError(f"server={server!r} must be an address such as http://localhost:8000.")
        self._server, self._timeout = server.rstrip("/"), timeout
        status, text = self._ask("/openapi.json")
        known = text if status == 200 else ""
        found = [pair for pair in ENDPOINTS if f'"{pair[0]}"' in known]
        if not found:
            raise EigenPeftError(
                f"The server at {server!r} has no endpoint for loading adapters. Start vLLM with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or SGLang with --enable-lora."
            )
        self._load, self._unload = found[0]

    def adapters(self, prefix: str) -> dict[str, str]:
        """Folder of each loaded adapter whose name begins so.

        Args:
            prefix: Start of the names.

        Raises:
            EigenPeftError: If the server does not say.
        """
        status, text = self._ask("/v1/models")
        if status != 200:
            raise EigenPeftError(
                f"{self._server}/v1/models answered {status}: {_message(text)}. Give the address of an OpenAI-compatible server."
            )
        models = json.loads(text)["data"]
        return {model["id"]: str(model.get("root")) for model in models if model["id"].startswith(prefix)}

    def load(self, name: str, path: Path) -> str | None:
        """Load an adapter; returns what went wrong, if anything did.

        Args:
            name: Its name in requests.
            path: Its folder, as the server sees it.

        Raises:
            EigenPeftError: If the server cannot be reached.
        """
        logger.info("Loading %r from %r", name, str(path))
        return self._failure(self._load, {"lora_name": name, "lora_path": str(path)})

    def unload(self, name: str) -> str | None:
        """Unload an adapter; returns what went wrong, if anything did.

        Args:
            name: Its name in requests.

        Raises:
            EigenPeftError: If the server cannot be reached.
        """
        logger.info("Unloading %r", name)
        return self._failure(self._unload, {"lora_name": name})

    def _failure(self, path: str, body: dict[str, str]) -> str | None:
        status, text = self._ask(path, body)
        return None if status == 200 else f"{status}: {_message(text)}"

    def _ask(self, path: str, body: dict[str, str] | None = None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._server + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except OSError as error:
            raise EigenPeftError(
                f"No answer from {self._server!r} ({getattr(error, 'reason', error)}). Check the address, and that the server "
                "has started."
            ) from error


def _message(text: str) -> str:
    """The sentence in a server's answer; the answer itself where there is none."""
    try:
        answer: Any = json.loads(text)
        answer = answer.get("error", answer)
        return str(answer.get("message") or answer.get("error_message") or answer)
    except (ValueError, AttributeError):
        return text.strip()[:500]
