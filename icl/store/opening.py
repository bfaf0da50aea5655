"""Open a store by its address."""

import re

from icl.config.validation import STORE_SCHEMES, user_path
from icl.files.redaction import redact
from icl.files.writing import StorageError
from icl.store.base import LocalStore, Store


def open_store(url: str) -> Store:
    """Return the store at an address: a folder's path, `file:///folder`, `s3://bucket/prefix` or `hf://USER/REPO`.

    Raises:
        StorageError: If the scheme of the URL is unknown, or the URL has no path or contains credentials.
        ConfigError: If a folder begins with `~` and no home folder is known.
    """
    scheme, _, path = url.partition("://") if "://" in url else ("file", "", url)
    scheme = scheme.lower()
    if scheme not in STORE_SCHEMES or not path:
        raise StorageError(
            f"A store must be a folder, file:///folder, s3://bucket/prefix or hf://USER/REPO, got {redact(url)!r}."
        )
    if scheme == "file":
        return LocalStore(user_path(path))
    if scheme == "hf":
        return _open_hub(url, path)
    bucket, _, prefix = path.partition("/")
    if "@" in bucket:
        raise StorageError(
            f"The store {redact(url)} must not contain credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
        )
    from icl.store.s3 import S3Store  # imports boto3, which local work does not need

    return S3Store(bucket, prefix)


def _open_hub(url: str, path: str) -> Store:
    is_plain = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.%-]+)?(/.*)?", path) is not None
    if not is_plain or {".", ".."} & set(path.split("/")):
        raise StorageError(
            f"A store on the Hugging Face Hub must be hf://USER/REPO or a folder below it, got {redact(url)!r}."
        )
    try:
        from icl.store.hub import open_hub  # imports huggingface_hub, which is an extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "huggingface_hub":
            raise
        raise StorageError(
            f"The store {redact(url)} needs the package huggingface_hub: `pip install 'icl[hub]'`."
        ) from None
    return open_hub(path)
