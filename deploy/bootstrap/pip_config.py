"""Where packages may come from: read from pip's own configuration, and handed to uv, which does not read it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Sources", "parse_pip_config", "read_sources"]


@dataclass(frozen=True)
class Sources:
    """The package indexes and wheel folders that pip is configured to use, and how it reaches them."""

    index_url: str | None = None
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    no_index: bool = False
    trusted_hosts: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def uv_args(self) -> list[str]:
        """The options that make uv look where pip would."""
        args = ["--no-index"] if self.no_index else []
        if self.index_url and not self.no_index:
            args += ["--index-url", self.index_url]
        if self.extra_index_urls and not self.no_index:
            # Like pip, weigh all indexes alike; every version is pinned, so the best match is the pinned one.
            args += ["--index-strategy", "unsafe-best-match"]
            args += [part for url in self.extra_index_urls for part in ("--extra-index-url", url)]
        args += [part for folder in self.find_links for part in ("--find-links", folder)]
        args += [part for host in self.trusted_hosts for part in ("--allow-insecure-host", host)]
        return args


def parse_pip_config(listing: str) -> Sources:
    """Read the output of `pip config list`: environment over [install] over [global]."""
    settings: dict[str, str] = {}
    ranks = {"global": 0, "install": 1, ":env:": 2}
    found: list[tuple[int, str, str]] = []
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ranks:
            found.append((ranks[section], key.replace("_", "-"), str(ast.literal_eval(value))))
    for _, key, value in sorted(found, key=lambda entry: entry[0]):
        settings[key] = value
    env = {}
    if cert := settings.get("cert"):
        env["SSL_CERT_FILE"] = cert
    if proxy := settings.get("proxy"):
        env["ALL_PROXY"] = proxy
    if timeout := settings.get("timeout") or settings.get("default-timeout"):
        env["UV_HTTP_TIMEOUT"] = timeout
    return Sources(
        index_url=settings.get("index-url"),
        extra_index_urls=tuple(settings.get("extra-index-url", "").split()),
        find_links=tuple(settings.get("find-links", "").split()),
        no_index=settings.get("no-index", "").lower() in ("1", "true", "yes", "on"),
        trusted_hosts=tuple(settings.get("trusted-host", "").split()),
        env=env,
    )


def read_sources(python: Path) -> Sources:
    """The sources of the pip that belongs to `python`."""
    listing = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True)
    return parse_pip_config(listing.stdout)
