"""The description of the server that programs read: OpenAPI, from the classes that check bodies."""

from __future__ import annotations

import functools
import json
from typing import Any

from pydantic.json_schema import models_json_schema

import l2s_jax
from l2s_jax.serve import answers, protocol

_WRONG = {
    "400": "The body does not fit.",
    "401": "No key, or another one.",
    "404": "No such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many requests are waiting.",
    "500": "The model failed.",
    "503": "The server is starting or stopping.",
    "504": "Not answered in time.",
}


@functools.cache
def document(models: tuple[str, ...]) -> str:
    """The document of /openapi.json, as JSON, of a server that offers these."""
    kinds: Any = [
        (kind, "validation" if issubclass(kind, protocol.Asked) else "serialization")
        for kind in (
            protocol.CompletionAsked,
            protocol.ChatAsked,
            answers.Completion,
            answers.Chat,
            answers.ModelList,
            answers.ModelCard,
            answers.Health,
            answers.Error,
        )
    ]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    named = {"enum": list(models)} if models else {}
    for kind in ("CompletionAsked", "ChatAsked"):
        schemas["$defs"][kind]["properties"]["model"] |= named
    keyed = {"security": [{}, {"key": []}]}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", **named}}
    fields = {
        "openapi": "3.1.0",
        "info": {"title": "l2s_jax", "version": l2s_jax.__version__},
        "paths": {
            "/v1/completions": {
                "post": {
                    "summary": "Answers prompts.",
                    **keyed,
                    **_asks("CompletionAsked", "Completion"),
                }
            },
            "/v1/chat/completions": {
                "post": {"summary": "Answers a chat.", **keyed, **_asks("ChatAsked", "Chat")}
            },
            "/v1/models": {
                "get": {
                    "summary": "The models.",
                    **keyed,
                    "responses": {"200": _gives("ModelList"), **_wrong("401")},
                }
            },
            "/v1/models/{name}": {
                "get": {
                    "summary": "A model.",
                    **keyed,
                    "parameters": [name],
                    "responses": {"200": _gives("ModelCard"), **_wrong("401", "404", "503")},
                }
            },
            "/health": {
                "get": {
                    "summary": "Whether requests are answered.",
                    "responses": {"200": _gives("Health"), "503": _gives("Health")},
                }
            },
            "/metrics": {
                "get": {
                    "summary": "Figures for Prometheus.",
                    "responses": {
                        "200": {"description": "Text.", "content": {"text/plain": {"schema": {}}}}
                    },
                }
            },
            "/openapi.json": {
                "get": {
                    "summary": "This document.",
                    "responses": {
                        "200": {
                            "description": "This document.",
                            "content": {"application/json": {"schema": {"type": "object"}}},
                        }
                    },
                }
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return json.dumps(fields)


def _schema(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _gives(name: str) -> dict[str, Any]:
    return {"description": f"{name}.", "content": _schema(name)}


def _wrong(*statuses: str) -> dict[str, Any]:
    return {
        status: {"description": _WRONG[status], "content": _schema("Error")} for status in statuses
    }


def _asks(body: str, answer: str) -> dict[str, Any]:
    given = _gives(answer)
    given["description"] = f"{answer}, or with stream=true its events, of which the last is [DONE]."
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    given["content"]["text/event-stream"] = {"schema": event}
    return {
        "requestBody": {"required": True, "content": _schema(body)},
        "responses": {"200": given, **_wrong(*_WRONG)},
    }
