"""Finding folders and files: local paths first, then the hub's cache; downloads only by request.

Nothing here touches the network unless `download` is called by name, and it refuses in offline mode
(`HF_HUB_OFFLINE=1`, `TRANSFORMERS_OFFLINE=1` or `LISAT_OFFLINE=1`).
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from utils.io import StrPath

logger = logging.getLogger(__name__)

KNOWN_REPOSITORIES = {
    "LISAt-7b": "jquenum/LISAt-7b",
    "LISAt_PRE-7B": "jquenum/LISAt_PRE-7B",
    "LISAt_PRE-7b": "jquenum/LISAt_PRE-7B",
    "remote_clip_vit_l_14": "wen-han/remote_clip_vit_l_14",
}
_SAM_ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth"


def is_offline() -> bool:
    """True if an environment variable forbids downloads."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "LISAT_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in names)


def resolve(name: StrPath, near: Iterable[StrPath] = (), what: str = "model folder") -> Path:
    """Local path of a folder or file that a configuration or a user names; never downloads.

    Tried in this order: `name` itself (`~` expanded; relative to the working directory); inside and
    beside each folder of `near` (the whole relative name, then its last part); the hub's cache, for ids
    `owner/name` and the published names.

    Raises:
        ValueError: found nowhere. The message lists the places and says what to fetch.
    """
    text = str(name).strip()
    if not text:
        raise ValueError(f"{what}: no path given")
    given = Path(text).expanduser()
    tried = [given]
    if not given.is_absolute():
        for folder in map(Path, near):
            tried += [folder / given, folder.parent / given]
    for folder in map(Path, near):
        tried += [folder / given.name, folder.parent / given.name]
    for path in dict.fromkeys(tried):
        if path.exists():
            return path
    cached = _cached(repository_of(text))
    if cached is not None:
        return cached
    places = ", ".join(str(path) for path in dict.fromkeys(tried))
    raise ValueError(f"{what} {text!r} was not found (tried {places} and the hub's cache). {_advice(text)}")


def repository_of(name: str) -> str | None:
    """Hub id of a name: a published folder name by table, `owner/name` as it is; None for anything else."""
    known = KNOWN_REPOSITORIES.get(Path(name).name)
    if known is not None:
        return known
    parts = name.split("/")
    looks_like_id = len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")
    return name if looks_like_id else None


def download(name: str, folder: StrPath | None = None) -> Path:
    """Download a hub repository on purpose (into `folder`, or the cache). The only function that does.

    Raises:
        ValueError: offline mode is on, or `name` is no repository.
    """
    repository = repository_of(name)
    if repository is None:
        raise ValueError(f"{name!r} is no hub repository (owner/name)")
    if is_offline():
        raise ValueError(f"offline mode is on, {repository} is not downloaded. {_advice(name)}")
    from huggingface_hub import snapshot_download

    logger.info("downloading %s", repository)
    return Path(snapshot_download(repository, local_dir=folder))


def _cached(repository: str | None) -> Path | None:
    if repository is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _advice(name: str) -> str:
    base = Path(name).name
    if base.startswith("sam_") or base == "PATH_TO_SAM_ViT-H":
        return f"Fetch {_SAM_ADDRESS} on a machine with internet and give the file's path."
    repository = repository_of(name)
    if repository is None:
        return "Give the path of an existing folder or file."
    return (
        f"On a machine with internet: `hf download {repository} --local-dir {base}`; "
        f"copy the folder here and give its path."
    )
