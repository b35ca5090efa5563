"""The name of a request on its way between processes."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class RequestId(NamedTuple):
    """One attempt at a request: messages of an earlier attempt are recognised by it and ignored."""

    request_id: str
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.request_id} (attempt {self.attempt})" if self.attempt else self.request_id


class RequestMessage(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message about one attempt at a request."""

    id: RequestId

    @property
    def request_id(self) -> str:
        """The request's name without the attempt."""
        return self.id.request_id
