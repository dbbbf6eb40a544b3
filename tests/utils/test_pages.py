"""Pages from templates: values stay text, a missing value is an error, the base holds all pages."""

import sys
from pathlib import Path

import pytest
from jinja2 import TemplateNotFound, UndefinedError
from markupsafe import Markup

from foundry_ext.utils.pages import render_page
from tests import browser

HOSTILE = """<script>alert(1)</script>" onload='x' {{ title }} {% raw %}"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package whose page.html shows `value` as text and in an attribute."""
    folder = tmp_path / "pages_of_a_test"
    (folder / "templates").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "templates" / "page.html").write_text(
        '{% extends "base.html" %}{% block content %}<p title="{{ value }}">{{ value }}</p>'
        "{{ count | thousands }}{% endblock %}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    return folder.name


def test_values_are_text(package: str):
    page = render_page(package, "page.html", title=HOSTILE, value=HOSTILE, count=1234567)
    assert page.count("&lt;script&gt;") == 4, "title, heading, attribute, paragraph"
    assert "<script" not in page and "' {{ title }} {% raw %}" not in page
    assert "&#39; {{ title }} {% raw %}</p>1,234,567" in page, "a value is no template"


def test_only_markup_passes_as_it_is(package: str):
    page = render_page(package, "page.html", title="t", value=Markup("<b>bold</b>"), count=0)
    assert "<b>bold</b></p>" in page


def test_the_base_refuses_scripts_and_foreign_files(package: str):
    page = render_page(package, "page.html", title="t", value="v", count=0)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert "color-scheme: light" in page, "the style is part of the page"
    assert browser.foreign_references(page) == []


def test_a_missing_value_is_an_error(package: str):
    with pytest.raises(UndefinedError, match="'value' is undefined"):
        render_page(package, "page.html", title="t", count=0)
    with pytest.raises(TemplateNotFound):
        render_page(package, "other.html", title="t")
