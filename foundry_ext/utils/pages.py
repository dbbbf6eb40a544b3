"""HTML pages from jinja2 templates: one file each, without scripts."""

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from foundry_ext.utils.output import printable


def render_page(package: str, template: str, **values: Any) -> str:
    """Fill a template that extends base.html.

    Autoescape turns every value into plain text, except a `Markup`. Terminal sequences and control
    characters are left out.

    Args:
        package: the package whose `templates` folder holds the template.
        template: the template's file name.
        **values: what the template can name. base.html needs `title`.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("foundry_ext.utils")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = "{:,}".format
    return printable(environment.get_template(template).render(values))
