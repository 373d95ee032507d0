"""Names of base models: which mean one (renamed repositories, slashes, the Hub's cache), and which are Hub ids."""

import re

_CACHED = re.compile(r"(?:^|/)models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+$")
_CACHED_ALONE = re.compile(r"(?:^|/)models--(?P<name>(?!.*--)[^/]+)/snapshots/[^/]+$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# Repositories that had no owner at first, by the start of their names; the Hub redirects the old names.
_OWNERS = {
    "albert-": "albert",
    "bert-base-cased": "google-bert",
    "bert-base-uncased": "google-bert",
    "bert-base-multilingual-": "google-bert",
    "bert-base-chinese": "google-bert",
    "bert-base-german-cased": "google-bert",
    "bert-large-": "google-bert",
    "camembert-base": "almanach",
    "ctrl": "Salesforce",
    "distilbert-": "distilbert",
    "distilgpt2": "distilbert",
    "distilroberta-base": "distilbert",
    "gpt2": "openai-community",
    "openai-gpt": "openai-community",
    "roberta-base-openai-detector": "openai-community",
    "roberta-large-openai-detector": "openai-community",
    "roberta-": "FacebookAI",
    "t5-": "google-t5",
    "transfo-xl-": "transfo-xl",
    "xlm-": "FacebookAI",
    "xlnet-": "xlnet",
}
_RENAMED = {"meta-llama/Meta-Llama-3.1-": "meta-llama/Llama-3.1-"}


def canonical_base(name: str) -> str:
    """One name for all that mean the same model; for comparing only.

    Args:
        name: What an adapter's config calls its base model: Hub id or path.

    Example:
        >>> canonical_base("gpt2"), canonical_base("openai-community/gpt2/")
        ('openai-community/gpt2', 'openai-community/gpt2')
        >>> canonical_base("/cache/models--meta-llama--Llama-3.2-1B/snapshots/0123")
        'meta-llama/Llama-3.2-1B'
    """
    name = name.replace("\\", "/").rstrip("/") or name
    if match := _CACHED.search(name):
        name = f"{match['owner']}/{match['name']}"
    elif match := _CACHED_ALONE.search(name):
        name = match["name"]
    if "/" not in name:
        owner = next((owner for start, owner in _OWNERS.items() if name.startswith(start)), None)
        return f"{owner}/{name}" if owner else name
    old = next((old for old in _RENAMED if name.startswith(old)), None)
    return _RENAMED[old] + name.removeprefix(old) if old else name


def hub_id(name: str | None) -> str | None:
    """The Hub id that a name is or, as a folder of the Hub's cache, stands for; None for other paths and for text.

    Args:
        name: What an adapter's config calls its base model.

    Example:
        >>> hub_id("meta-llama/Llama-3.2-1B"), hub_id("/models/llama")
        ('meta-llama/Llama-3.2-1B', None)
    """
    if name is None:
        return None
    if _HUB_ID.fullmatch(name):
        return name
    found = _CACHED.search(name.replace("\\", "/").rstrip("/"))
    return f"{found['owner']}/{found['name']}" if found else None
