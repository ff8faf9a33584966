"""`/openapi.json`, and `/docs`: the same to read, a page without scripts that loads nothing from anywhere."""

import html
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse

VERSION = importlib.metadata.version("splitsam")
router = APIRouter(include_in_schema=False)
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>splitsam gateway</title>
<style>
html { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8888 }
code, pre { font: 14px/1.5 ui-monospace, monospace }
pre { background: #8882; padding: .7rem; overflow-x: auto }
table { border-collapse: collapse; margin: .7rem 0 }
td, th { border: 1px solid #8888; padding: .25rem .6rem; text-align: left; vertical-align: top }
</style>
"""


@router.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def page(request: Request) -> HTMLResponse:
    headers = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return HTMLResponse("".join(_page(request.app.openapi())), headers=headers)


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    yield _HEAD
    yield f"<h1>{html.escape(info['title'])} {html.escape(info['version'])}</h1>\n"
    yield f'<p>{html.escape(info["summary"])} For programs: <a href="/openapi.json">openapi.json</a>.</p>\n'
    for paragraph in info["description"].split("\n\n"):
        yield f"<p>{html.escape(paragraph)}</p>\n"
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            yield from _route(path, method, route)
    yield "<h2>Messages</h2>\n"
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        yield from _message(name, schema)


def _route(path: str, method: str, route: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>\n"
    yield f"<p>{html.escape(route.get('summary', ''))}</p>\n"
    for paragraph in route.get("description", "").split("\n\n"):
        yield f"<p>{html.escape(paragraph)}</p>\n"
    takes = route.get("requestBody", {}).get("content", {})
    if takes:
        kinds = (f"{_type(each['schema'])} (<code>{html.escape(kind)}</code>)" for kind, each in takes.items())
        yield f"<p>Takes {', '.join(kinds)}.</p>\n"
    for status, answer in route["responses"].items():
        for each in answer.get("content", {}).values():
            if each.get("schema"):
                yield f"<p>Answers {'with' if status == '200' else 'on failure with'} {_type(each['schema'])}.</p>\n"


def _message(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f'<h3 id="{html.escape(name)}">{html.escape(name)}</h3>\n'
    yield f"<p>{html.escape(schema.get('description', ''))}</p>\n"
    yield "<table><tr><th>Field</th><th>Type</th><th>Meaning</th></tr>\n"
    required = schema.get("required", ())
    for field, each in schema.get("properties", {}).items():
        default = "" if field in required else f"; default <code>{html.escape(json.dumps(each.get('default')))}</code>"
        meaning = html.escape(each.get("description", ""))
        yield f"<tr><td><code>{html.escape(field)}</code></td><td>{_type(each)}{default}</td><td>{meaning}</td></tr>\n"
    yield "</table>\n"


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f"<code>{html.escape(json.dumps(each))}</code>" for each in schema["enum"])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(_type(each) for each in schema['prefixItems'])}]"
        return f"list of {_type(schema['items'])}"
    return html.escape(schema.get("format") or schema.get("type", "anything"))
