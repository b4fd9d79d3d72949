"""What a person sees in a browser: the page at /, and the routes at /docs. Both load nothing from elsewhere."""

from __future__ import annotations

import html
import json
from importlib import resources

HEAD = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22292f; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem }
pre { background: #eef1f3; padding: .5rem; overflow-x: auto }
code { white-space: nowrap; background: #eef1f3; padding: .1rem .3rem }
p { margin: .3rem 0; color: #55606a } table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #dde2e6 }
td { vertical-align: top; overflow-wrap: anywhere }
a { color: #1f7a8c }
"""


def front() -> str:
    """The page at /."""
    return resources.files("sparsebert").joinpath("assets/serve/page.html").read_text(encoding="utf-8")


def reference(document: dict) -> str:
    """The routes and bodies of an OpenAPI document as a page."""
    schemas, said = document["components"]["schemas"], html.escape
    parts = [f"<h1>{said(document['info']['title'])} {said(document['info']['version'])}</h1>"]
    parts.append('<p><a href="./">Try it</a> · <a href="openapi.json">The same as an OpenAPI document</a></p>')
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {said(path)}</code></h2>")
            parts.append(f"<p>{said(operation.get('description') or operation.get('summary', ''))}</p>")
            if body := operation.get("requestBody"):
                parts.append(f"<p>Takes {_type(body['content']['application/json']['schema'])}.</p>")
            answer = (
                operation["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
            )
            if "$ref" in answer:
                parts.append(f"<p>Answers {_type(answer)}.</p>")
            told = [(status, each["description"]) for status, each in operation["responses"].items() if status != "200"]
            if told:
                parts.append(_table((f"<code>{said(status)}</code>", said(text)) for status, text in told))
    for name, schema in schemas.items():
        parts.append(f'<h2 id="{said(name)}">{said(name)}</h2><p>{said(schema.get("description", ""))}</p>')
        rows = [
            (f"<code>{said(field)}</code>", _type(each), _default(each, field in schema.get("required", [])),
             said(each.get("description", "")))
            for field, each in schema.get("properties", {}).items()
        ]  # fmt: skip
        parts.append(_table(rows) if rows else f"<p>{_type(schema)}</p>")
        parts += [f"<pre>{said(json.dumps(each))}</pre>" for each in schema.get("examples", [])]
    title = f"<title>Routes · {said(document['info']['title'])}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{HEAD}{title}</head><body>{"".join(parts)}</body></html>'


def _table(rows) -> str:
    cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _default(schema: dict, required: bool) -> str:
    if required:
        return "required"
    return "" if schema.get("default") is None else f"default {html.escape(str(schema['default']).lower())}"


def _type(schema: dict) -> str:
    """A JSON schema in a few words."""
    if reference := schema.get("$ref"):
        name = html.escape(reference.rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if kinds := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(_type(kind) for kind in kinds if kind.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        return " or ".join(
            f"<code>{html.escape(str(value))}</code>" for value in schema.get("enum", [schema.get("const")])
        )
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return html.escape(str(schema.get("type", "anything")))
