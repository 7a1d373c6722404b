"""Pictures on their way out: encoded in threads, and a small store for callers who want a link instead of the bytes."""

import asyncio
import base64
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fewstep.runtime.sampling.events import Picture, Result
from fewstep.runtime.sampling.images import encode
from fewstep.runtime.sampling.infotext import picture_metadata

from .errors import Refused
from .provenance import Signatory, statement
from .wire import Format, Job

PREVIEW_QUALITY = 70


@dataclass(frozen=True)
class Encoded:
    """Picture files in request order, and what encoding them took."""

    files: tuple[bytes, ...]
    encode_s: float

    def base64(self) -> list[str]:
        return [base64.b64encode(file).decode("ascii") for file in self.files]


async def encoded(pool: ThreadPoolExecutor, result: Result, job: Job, signatory: Signatory | None = None) -> Encoded:
    """Encode a result's pictures, one thread each; every file carries the request that makes it again.

    signatory: signs each file, where the operator has a certificate.
    """
    began = time.perf_counter()
    loop = asyncio.get_running_loop()
    calls = [
        loop.run_in_executor(pool, _file, number, result, job, signatory) for number in range(len(result.pictures))
    ]
    files: Sequence[bytes] = await asyncio.gather(*calls)
    return Encoded(tuple(files), time.perf_counter() - began)


def _file(number: int, result: Result, job: Job, signatory: Signatory | None) -> bytes:
    seed = result.seeds[number]
    options = {} if job.level is None else {"level" if job.format == "png" else "quality": job.level}
    about = metadata(result, job, seed)
    file = encode(result.pictures[number], job.format, metadata=about, **options)
    if signatory is None:
        return file
    return signatory.sign(file, job.format, statement(result, seed), edited=job.request.edit is not None)


def metadata(result: Result, job: Job, seed: int) -> dict[str, str]:
    """What the file of a job's picture says of its making."""
    return picture_metadata(result, job.request, seed, job.sampler)


def preview_file(preview: Picture, form: Format, size: tuple[int, int] | None = None) -> str:
    """A preview as a file in base64, enlarged to (width, height) where that is asked for."""
    image = Image.fromarray(preview)
    if size not in (None, image.size):
        image = image.resize(size, Image.Resampling.BICUBIC)
    return base64.b64encode(preview_bytes(np.asarray(image), form)).decode("ascii")


def preview_bytes(preview: Picture, form: Format) -> bytes:
    """A preview as a file, as small as it is."""
    return encode(preview, form, quality=None if form == "png" else PREVIEW_QUALITY)


def account(result: Result, files: Encoded) -> dict[str, Any]:
    """What was run and how long each stage took, the same in every reply."""
    t = result.timings
    return {
        "model": result.model,
        "steps": result.steps,
        "guidance": result.guidance,
        "nfe": result.nfe,
        "seeds": list(result.seeds),
        **({"scores": list(result.scores), "refined": list(result.refined)} if result.scores else {}),
        "notes": list(result.notes),
        "timings": {
            "queue_s": t.queue_s,
            "text_s": t.text_s,
            "denoise_s": t.denoise_s,
            "decode_s": t.decode_s,
            "encode_s": files.encode_s,
            "total_s": t.total_s + files.encode_s,
            "predicted_s": t.predicted_s,
        },
    }


class Store:
    """Files kept for a while under unguessable names, the oldest dropped first. Used from the event loop only."""

    def __init__(self, max_bytes: int, keep_s: float) -> None:
        self._max_bytes, self._keep_s = max_bytes, keep_s
        self._files: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0

    def put(self, file: bytes, suffix: str, now_s: float) -> str:
        """Keep a file; the name to fetch it by.

        Errors: `Refused` 400 where one file alone is above the bound.
        """
        if len(file) > self._max_bytes:
            message = "response_format is 'url', but this server does not keep pictures this large; use 'b64_json'"
            raise Refused(400, "invalid_value", message, param="response_format")
        self._drop(now_s, self._max_bytes - len(file))
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        self._files[name] = (now_s, file)
        self._bytes += len(file)
        return name

    def get(self, name: str, now_s: float) -> bytes:
        self._drop(now_s, self._max_bytes)
        if name not in self._files:
            raise Refused(404, "not_found", "this picture is no longer kept; make it again, or ask for b64_json")
        return self._files[name][1]

    def _drop(self, now_s: float, max_bytes: int) -> None:
        while self._files:
            oldest, (since_s, file) = next(iter(self._files.items()))
            if self._bytes <= max_bytes and now_s - since_s < self._keep_s:
                return
            del self._files[oldest]
            self._bytes -= len(file)
