"""Pages in headless Chromium; tests that need it are skipped if it is missing."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found on this machine")


def dom(page: Path, profile: Path) -> str:
    """Return the page's document as Chromium builds it, after its scripts have run."""
    return _chromium(page, profile, ["--dump-dom"])


def screenshot(page: Path, image: Path, profile: Path, *, width: int, height: int = 1600) -> None:
    """Write a screenshot of the page as a PNG of that size."""
    options = [f"--window-size={width},{height}", f"--screenshot={image}", "--hide-scrollbars"]
    _chromium(page, profile, options)


def _chromium(page: Path, profile: Path, options: Sequence[str]) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={profile}", *options, page.absolute().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def foreign_references(html: str) -> list[str]:
    """Return addresses that a page would load: of sources, stylesheets and imports.

    Links that a reader may follow and names of XML namespaces load nothing.
    """
    found = re.findall(
        r"""<[^>]*\s(?:src|srcset|data|poster|action)\s*=\s*["']?([^"'\s>]+)""", html
    )
    found += re.findall(r"""<link[^>]*\shref\s*=\s*["']?([^"'\s>]+)""", html)
    found += re.findall(r"""(?:@import|url\()\s*["']?([^"'\s)]+)""", html)
    return [address for address in found if not address.startswith(("#", "data:"))]
