"""Models that come and go while the server runs, by the holder of an admin key.

A model is named, never given as a path: it is a bundle folder below FEWSTEP_MODELS_DIR, or a shipped bundle.
"""

import asyncio
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from fewstep.runtime.errors import BundleError

from .errors import Refused
from .routes_openai import model_card
from .service import Service, service_of
from .visit import current

router = APIRouter()
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@router.post("/v1/models/{name}")
async def load(name: str, request: Request) -> dict[str, Any]:
    """Serve one more model. Answers once its engine is open, warm and measured."""
    service = _for_admins(request)
    if name in service.runtime.models:
        raise Refused(400, "invalid_value", f"model {name!r} is served already; DELETE it first", param="name")
    found = _folder(name, service.settings.models_dir)
    try:
        model = await asyncio.to_thread(service.runtime.load, found)
    except BundleError as error:
        raise Refused(400, "bundle_error", str(error), param="name") from error
    return model_card(service, model.name)


@router.delete("/v1/models/{name}")
async def unload(name: str, request: Request) -> dict[str, Any]:
    """Serve a model no longer: what it works on is finished first, for as long as FEWSTEP_DRAIN_S."""
    service = _for_admins(request)
    if name not in service.runtime.models:
        raise Refused(404, "model_not_found", f"model {name!r} is not served here", param="name")
    if len(service.runtime.models) == 1:
        raise Refused(400, "invalid_value", f"model {name!r} is the only one; POST another one first", param="name")
    try:
        await asyncio.to_thread(service.runtime.unload, name, service.settings.drain_s)
    except BundleError as error:
        raise Refused(400, "invalid_value", str(error), param="name") from error
    return {"id": name, "object": "model", "deleted": True}


def _for_admins(request: Request) -> Service:
    """The service, for the holder of an admin key.

    Errors: `Refused` 403.
    """
    visit = current.get()
    if visit is None or visit.caller is None or not visit.caller.key.admin:
        message = "loading and unloading models needs an admin key: `fewstep keys add NAME --admin` makes one"
        raise Refused(403, "admin_key_required", message)
    return service_of(request)


def _folder(name: str, models_dir: str) -> str | Path:
    """Where the model of a name is.

    Errors: `Refused` 404 where the name is none, or leads elsewhere.
    """
    folder = Path(models_dir) / name if models_dir else None
    if not _NAME.fullmatch(name):
        raise Refused(404, "model_not_found", f"{name!r} is no model's name; names are letters, digits, '.', '_', '-'")
    return folder if folder is not None and folder.is_dir() else name
