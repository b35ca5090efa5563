"""Settings of `shoal serve`."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shoal.parallel.settings import Setting, check_settings

KEY_VARIABLE = "SHOAL_API_KEY"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeArgs:
    """Where the server listens and how much it takes."""

    host: Annotated[str, Setting("Address to listen on; other than loopback needs a key or --insecure.")] = "127.0.0.1"
    port: Annotated[int, Setting("Port to listen on; 0 takes a free one.", ge=0, le=65535)] = 8000
    served_model_name: Annotated[
        str | None,
        Setting("Name of the model in requests and answers.", derived="the name of the model directory"),
    ] = None
    api_key_file: Annotated[
        str | None,
        Setting(
            "File with keys, one per line; a request needs one of them. The environment variable SHOAL_API_KEY may "
            "have one, too.",
            metavar="FILE",
            is_path=True,
        ),
    ] = None
    ssl_certfile: Annotated[
        str | None, Setting("Certificate of the server, in PEM, for HTTPS.", metavar="FILE", is_path=True)
    ] = None
    ssl_keyfile: Annotated[
        str | None,
        Setting("Key of the certificate.", derived="in the certificate's file", metavar="FILE", is_path=True),
    ] = None
    max_num_queued_reqs: Annotated[
        int, Setting("Sequences that run or wait; requests beyond are refused with status 429.", ge=1)
    ] = 10_000
    log_requests: Annotated[bool, Setting("Print one line of JSON on stdout for every request.")] = True
    shutdown_timeout_s: Annotated[
        float, Setting("Longest wait for running requests after SIGTERM, in seconds.", ge=0)
    ] = 60.0

    def __post_init__(self) -> None:
        check_settings(self)
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile needs ssl_certfile")

    def read_keys(self) -> list[str]:
        """The keys of the file and of the environment; ValueError for a file without any."""
        keys = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
        if self.api_key_file is None:
            return keys
        lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"api_key_file {self.api_key_file} has no key; write one per line")
        return keys + found

    def check_exposure(self, *, has_keys: bool, insecure: bool) -> None:
        """ValueError for an address that others can reach, without a key."""
        if has_keys or insecure or _is_loopback(self.host):
            return
        raise ValueError(
            f"host {self.host} can be reached from other machines, and no key is needed: give api_key_file or "
            f"{KEY_VARIABLE}, or --insecure"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
