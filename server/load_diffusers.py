"""The server that everybody writes first, kept to be compared with: FastAPI, one diffusers pipeline, one lock.

`python -m fewstep.server.load_diffusers BUNDLE` serves POST /v1/images/generations. The pipeline is diffusers' own, in
float32 and without a progress bar, in a thread of the web server's pool; the picture is PNG in base64.
"""

import argparse
import base64
import io
import json
import sys
import threading
from collections.abc import Sequence
from typing import Any

from .load_servers import end_with_stdin


def create_app(bundle: str) -> Any:
    """The application over one bundle's folder or short name, with its pipeline loaded and warm."""
    import torch
    from fastapi import FastAPI
    from pydantic import BaseModel

    from fewstep.runtime.bench.diffusers_pipeline import hushed, open_named

    pipeline, settings = open_named(bundle)
    lock = threading.Lock()
    app = FastAPI()

    class Body(BaseModel):
        prompt: str
        num_inference_steps: int = 4
        seed: int = 0

    def paint(body: Any) -> bytes:
        generator = torch.Generator("cpu").manual_seed(body.seed)
        with lock, hushed(), torch.inference_mode():
            image = pipeline(body.prompt, generator=generator, **settings[body.num_inference_steps]).images[0]
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()

    @app.post("/v1/images/generations")
    def generate(body: Body) -> dict[str, Any]:
        return {"data": [{"b64_json": base64.b64encode(paint(body)).decode("ascii")}]}

    for steps in settings:
        paint(Body(prompt="warm up", num_inference_steps=steps))
    return app


def main(argv: Sequence[str]) -> int:
    """See the module text. Exit codes: 0."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.server.load_diffusers")
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    import torch
    import uvicorn

    from .commands import listen

    torch.set_num_threads(args.threads)
    app = create_app(args.bundle)
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        end_with_stdin(server)
        print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "models": [None]}), flush=True)
        server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
