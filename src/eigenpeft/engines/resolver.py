"""From a model's name to a plain LoRA folder that an engine can load: found in a store, checked, padded, cached."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

from eigenpeft.engines.catalog import StoreCatalog, StoredAdapter
from eigenpeft.engines.lora_cache import LoraCache
from eigenpeft.errors import AdapterConfigError, EigenPeftError, UnknownAdapterError
from eigenpeft.tuners.files.lora_files import fill_lora_folder

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM allows as --max-lora-rank."""
_MEMORY = Path("/dev/shm")
logger = logging.getLogger(__name__)


class AdapterResolver:
    """Adapters of stores as folders that an engine loads.

    Args:
        catalog: The stores.
        cache: Where folders are written.
        ranks: Ranks to pad to, ascending: an adapter gets the smallest that holds its own.
        max_rank: Largest rank that the server takes; None for any.
        base_models: Further names of the base model that the server serves, such as the Hub id of what lies in a local
            folder.

    Examples:
        >>> resolver = AdapterResolver.from_environment({})  # without EIGENPEFT_STORE there is nothing to do
        >>> resolver is None
        True
    """

    def __init__(
        self,
        catalog: StoreCatalog,
        *,
        cache: LoraCache,
        ranks: Sequence[int] = VLLM_RANKS,
        max_rank: int | None = None,
        base_models: Sequence[str] = (),
    ):
        self.catalog, self.cache = catalog, cache
        self.ranks, self.max_rank, self.base_models = tuple(ranks), max_rank, tuple(base_models)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "AdapterResolver | None":
        """The resolver that environment variables ask for; None without EIGENPEFT_STORE.

        EIGENPEFT_STORE: folders or Hub ids of stores, separated by commas. EIGENPEFT_CACHE_DIR: folder of the cache;
        default: in the memory file system where there is one, else in the folder for temporary files. EIGENPEFT_CACHE_GB:
        its bound, default 1. EIGENPEFT_BASE_MODEL: further names of the served base model, separated by commas.

        Args:
            environment: Variables by name; None takes the process's own.

        Raises:
            EigenPeftError: If a variable cannot be understood or a store cannot be opened.
        """
        given = os.environ if environment is None else environment
        places = _listed(given.get("EIGENPEFT_STORE", ""))
        if not places:
            return None
        size = given.get("EIGENPEFT_CACHE_GB", "1")
        try:
            max_bytes = int(float(size) * 1e9)
        except (ValueError, OverflowError):
            max_bytes = 0
        if max_bytes < 1:
            raise EigenPeftError(f"EIGENPEFT_CACHE_GB={size!r} must be a positive number of gigabytes, such as 0.5.")
        temporary = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(gettempdir())
        folder = given.get("EIGENPEFT_CACHE_DIR") or temporary / f"eigenpeft-loras-{_user()}"
        cache = LoraCache(folder, max_bytes=max_bytes)
        return cls(StoreCatalog(places), cache=cache, base_models=_listed(given.get("EIGENPEFT_BASE_MODEL", "")))

    def resolve(self, model_name: str, *, base_model: str) -> Path:
        """The folder of the adapter that a request names, written if it is not there.

        Args:
            model_name: `STORE/MEMBER` or `MEMBER`.
            base_model: Base model that the server serves: its folder or Hub id.

        Raises:
            UnknownAdapterError: If no store has it; the message lists near names.
            AdapterConfigError: If it is of another base model, or its rank is too large for the server.
            EigenPeftError: If the adapter alone is larger than the cache.
        """
        adapter = self.catalog.find(model_name)
        self._check_base(adapter, base_model)
        return self._written(adapter)

    def is_current(self, model_name: str, *, folder: str | Path) -> bool:
        """Whether a folder that was resolved earlier is still what the name means; notes that it is in use.

        Args:
            model_name: The name that was resolved.
            folder: What `resolve` returned. Other folders are not this resolver's business and count as current.

        Raises:
            AdapterConfigError: If the adapter's rank is now larger than the server takes.
        """
        if not self.owns(folder):
            return True
        try:
            adapter = self.catalog.find(model_name)
        except UnknownAdapterError:
            return False
        key = self._key(adapter)
        self.cache.touch(key)
        return key == Path(folder).name

    def owns(self, folder: str | Path) -> bool:
        """Whether a folder is one of the cache's.

        Args:
            folder: Folder of an adapter.
        """
        return Path(folder).parent == self.cache.cache_dir

    @contextmanager
    def present(self, model_name: str, *, folder: str | Path) -> Iterator[None]:
        """Keep a folder that was resolved earlier in place while it is read; write it again if it has gone meanwhile.

        Args:
            model_name: The name that was resolved.
            folder: What `resolve` returned; other folders are left alone.

        Raises:
            UnknownAdapterError: If it has gone, and the store no longer has that member as it was.
            AdapterConfigError: If its rank is larger than the server takes.
            EigenPeftError: If the adapter alone is larger than the cache.
        """
        if not self.owns(folder):
            yield
            return
        with self.cache.locked():
            if not self.cache.touch(Path(folder).name):
                adapter = self.catalog.find(model_name)
                if self._key(adapter) != Path(folder).name:
                    raise UnknownAdapterError(
                        f"{model_name!r} was replaced in its store while a request for it was waiting; ask again."
                    )
                self._written(adapter)
            yield

    def _written(self, adapter: StoredAdapter) -> Path:
        key = self._key(adapter)
        if self.cache.touch(key):
            return self.cache.path(key)
        updates, fields, others = self.catalog.contents(adapter)
        rank = self._padded_rank(adapter)
        # Padded factors in float32, the other tensors, and room for headers, the config and the README.
        factors = sum(
            4 * -(-rank // update.rank) * (update.lora_A.numel() + update.lora_B.numel()) for update in updates
        )
        rest = sum(tensor.numel() * tensor.element_size() for tensor in others.values())
        n_bytes = factors + rest + 1024 * (len(updates) + len(others)) + 32_768

        def write(folder: Path) -> None:
            fill_lora_folder(folder, updates=updates, fields=fields, others=others, rank=rank)

        return self.cache.add(key, n_bytes=n_bytes, write=write)

    def _key(self, adapter: StoredAdapter) -> str:
        return f"{adapter.key}-r{self._padded_rank(adapter)}"

    def _padded_rank(self, adapter: StoredAdapter) -> int:
        largest = self.max_rank or max(self.ranks)
        if adapter.rank > largest:
            raise AdapterConfigError(
                f"{adapter.member!r} has rank {adapter.rank}; this server takes ranks up to {largest}. Start it with a larger "
                "--max-lora-rank, or put the adapter into the store at a smaller rank."
            )
        return min((rank for rank in self.ranks if adapter.rank <= rank <= largest), default=largest)

    def _check_base(self, adapter: StoredAdapter, served: str) -> None:
        named = adapter.base_model
        if named is None:
            logger.warning("The store %r does not say which base model it is for; %r is served.", adapter.store, served)
            return
        if named in (served, *self.base_models):
            return
        if Path(named).is_dir() and Path(served).is_dir() and Path(named).resolve() == Path(served).resolve():
            return
        raise AdapterConfigError(
            f"{adapter.member!r} of the store {adapter.store!r} is for the base model {named!r}; this server serves {served!r}. "
            f"Serve that base, or, if both are the same model, start the server with EIGENPEFT_BASE_MODEL={named!r}."
        )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"
