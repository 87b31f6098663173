"""A model behind a server with the OpenAI API: on this machine, unless the reader says otherwise.

Such a server is started by `vllm serve MODEL` or `transformers serve MODEL`. Needs the package
openai, which comes with the course's extra `judge`. Not needed to follow the course.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import OpenAI

URL = "http://127.0.0.1:8000/v1"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def client(url: str, *, allow_remote: bool = False, timeout: float) -> OpenAI:
    """A client that asks the server at `url` once, and waits so many seconds for a reply.

    Neither a proxy nor a redirect may carry a note elsewhere. Raises ValueError for a server on
    another machine, unless `allow_remote`, and ModuleNotFoundError without the package openai.
    """
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a model behind a server needs the package openai: pip install 'openai>=3.57,<4'"
        ) from error
    transport = openai.DefaultHttpxClient(trust_env=False, follow_redirects=False)
    connection = openai.OpenAI(
        base_url=url, api_key="none", timeout=timeout, max_retries=0, http_client=transport
    )
    if connection.base_url.host not in LOCAL_HOSTS and not allow_remote:
        raise ValueError(
            f"{url!r} is not on this machine, and notes of MIMIC-IV may not leave it. Serve the "
            "model here, at 127.0.0.1; pass allow_remote=True only for notes that anyone may read."
        )
    return connection
