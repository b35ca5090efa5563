"""Identification of requests in messages between processes."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class RequestId(NamedTuple):
    """Id of one attempt at a request; messages of earlier attempts are recognised by it and ignored."""

    request_id: str
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.request_id} (attempt {self.attempt})" if self.attempt else self.request_id


class RequestMessage(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message about one attempt at a request."""

    id: RequestId

    @property
    def request_id(self) -> str:
        """Id of the request without the attempt."""
        return self.id.request_id
