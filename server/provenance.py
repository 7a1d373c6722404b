"""Content Credentials (C2PA): a signed statement in each picture that a model of this server made it, and how.

The operator gives a certificate chain and its key; https://c2pa.org says who issues such certificates. A viewer that
does not know the issuer shows the statement as intact, and its signer as unknown.
"""

import io
import json
from pathlib import Path
from typing import Any

from fewstep.runtime.sampling.events import Result

from .settings import BadSetting, Settings

_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Signatory:
    """Signs pictures with one certificate; may be called from several threads."""

    def __init__(self, settings: Settings, version: str) -> None:
        """Errors: `BadSetting` where the package is missing, or a file cannot be read or used."""
        try:
            import c2pa  # type: ignore[import-untyped]
        except ImportError as error:
            raise BadSetting(
                "FEWSTEP_C2PA_CHAIN is set, but c2pa is not installed; run: pip install 'fewstep[c2pa]'"
            ) from error
        self._c2pa, self._version = c2pa, version
        if not settings.c2pa_key:
            raise BadSetting("FEWSTEP_C2PA_CHAIN is set and FEWSTEP_C2PA_KEY is not; give the chain's private key")
        chain = _read(settings.c2pa_chain, "FEWSTEP_C2PA_CHAIN")
        key = _read(settings.c2pa_key, "FEWSTEP_C2PA_KEY")
        algorithm = settings.c2pa_algorithm.encode()
        stamp = settings.c2pa_timestamp_url.encode() or None
        options = {"builder": {"thumbnail": {"enabled": False}}}  # it would cost 100 times the signing
        self._context = c2pa.Context(c2pa.Settings.from_dict(options))
        try:
            self._signer: c2pa.Signer = c2pa.Signer.from_info(
                c2pa.C2paSignerInfo(alg=algorithm, sign_cert=chain, private_key=key, ta_url=stamp)
            )
            self.sign(_dot(), "png", {}, edited=False)
        except c2pa.C2paError as error:
            raise BadSetting(
                f"FEWSTEP_C2PA_CHAIN and FEWSTEP_C2PA_KEY cannot sign with {settings.c2pa_algorithm} ({error}); give a "
                "PEM chain, the signing certificate first, whose key usage is digitalSignature, and its PEM key"
            ) from error

    def sign(self, file: bytes, form: str, made: dict[str, Any], *, edited: bool) -> bytes:
        """The file with a signed manifest in it. made: what is stated of how it was made; edited: from a picture."""
        kind = "compositeWithTrainedAlgorithmicMedia" if edited else "trainedAlgorithmicMedia"
        agent = {"name": "fewstep", "version": self._version}
        created = {"action": "c2pa.created", "digitalSourceType": _SOURCE + kind, "softwareAgent": agent}
        manifest = {
            "claim_generator_info": [agent],
            "format": _MEDIA[form],
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
                {"label": "org.fewstep.generation", "data": made},
            ],
        }
        signed = io.BytesIO()
        with self._c2pa.Builder(json.dumps(manifest), context=self._context) as builder:
            builder.sign(self._signer, _MEDIA[form], io.BytesIO(file), signed)
        return signed.getvalue()


def signatory(settings: Settings, version: str) -> Signatory | None:
    """The signer that the settings ask for; None where they ask for none.

    Errors: `BadSetting`.
    """
    return Signatory(settings, version) if settings.c2pa_chain else None


def statement(result: Result, seed: int) -> dict[str, Any]:
    """What is stated of a picture: nothing of the prompt, which is the caller's to publish."""
    return {"model": result.model, "steps": result.steps, "seed": seed, "guidance": result.guidance}


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSetting(f"{setting} is {path!r}, which cannot be read ({error.strerror}); give a PEM file") from error


def _dot() -> bytes:
    """The smallest picture, to try the certificate on."""
    import numpy as np

    from fewstep.runtime.sampling.images import encode

    return encode(np.zeros((1, 1, 3), np.uint8))
