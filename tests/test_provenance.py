"""Content Credentials: a picture of the server, signed with a certificate made here, as the package verifies it."""

import base64
import datetime
import io
import json
import sys

import pytest
from live import fake_server
from PIL import Image

from fewstep.runtime.sampling.images import read_metadata
from fewstep.server.provenance import signatory
from fewstep.server.settings import BadSetting, Settings

c2pa = pytest.importorskip("c2pa")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A root and a signing certificate by it, as PEM files: `chain`, `key`, and the chain without its key's use."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder, now = tmp_path_factory.mktemp("certificates"), datetime.datetime.now(datetime.UTC)
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, text)])

    def certificate(subject: str, public, ca: bool):
        others = {"key_encipherment": False, "data_encipherment": False, "key_agreement": False}
        others |= {"content_commitment": False, "encipher_only": False, "decipher_only": False}
        use = x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **others)
        made = (
            x509.CertificateBuilder(name("Test root"), name(subject), public, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(use, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )
        if not ca:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            made = made.add_extension(purpose, critical=False)
        return made.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root = certificate("Test root", root_key.public_key(), ca=True)
    leaf = certificate("Test operator", key.public_key(), ca=False)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    texts = {"chain": leaf + root, "key": secret, "root": root, "junk": b"no certificate"}
    for file, text in texts.items():
        (folder / f"{file}.pem").write_bytes(text)
    return {file: str(folder / f"{file}.pem") for file in texts}


@pytest.fixture(scope="module")
def live(files):
    with fake_server(Settings(c2pa_chain=files["chain"], c2pa_key=files["key"])) as server:
        yield server


def read(file: bytes, form: str) -> tuple[dict, str]:
    """(active manifest, validation state) as the package reads them."""
    with c2pa.Reader(f"image/{form}", io.BytesIO(file)) as reader:
        found = json.loads(reader.json())
        return found["manifests"][found["active_manifest"]], reader.get_validation_state()


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_every_picture_says_that_a_model_made_it_and_who_signs(live, form):
    reply = live.generate(seed=5, steps=4, format=form).json()
    file = base64.b64decode(reply["pictures"][0]["b64"])
    manifest, state = read(file, form)
    assert state == "Valid" and manifest["signature_info"]["issuer"] == "Test operator"
    assert manifest["claim_generator_info"][0]["name"] == "fewstep"
    said = {assertion["label"]: assertion["data"] for assertion in manifest["assertions"]}
    (action,) = said["c2pa.actions.v2"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert said["org.fewstep.generation"] == {"model": "fake", "steps": 4, "seed": 5, "guidance": 3.0}
    assert Image.open(io.BytesIO(file)).size == (64, 64) and read_metadata(file)["seed"] == "5"


def test_a_changed_picture_is_found_out(live):
    file = bytearray(base64.b64decode(live.generate(format="jpeg", n=1).json()["pictures"][0]["b64"]))
    file[-40] ^= 1
    assert read(bytes(file), "jpeg")[1] == "Invalid"


def test_pictures_by_link_are_signed_too(live):
    url = live.images(response_format="url").json()["data"][0]["url"]
    assert read(live.http.get(url).content, "png")[1] == "Valid"


def test_without_a_certificate_nothing_is_signed():
    assert signatory(Settings(), "0") is None


@pytest.mark.parametrize(
    ("chain", "key", "part"),
    [
        ("chain", None, "FEWSTEP_C2PA_KEY is not"),
        ("missing", "key", "cannot be read"),
        ("junk", "key", "cannot sign"),
        ("chain", "junk", "cannot sign"),
        ("root", "key", "cannot sign"),
    ],
)
def test_a_certificate_that_cannot_sign_is_said_at_the_start(files, chain, key, part):
    settings = Settings(c2pa_chain=files.get(chain, "/none.pem"), c2pa_key=files[key] if key else "")
    with pytest.raises(BadSetting, match=part):
        signatory(settings, "0")


def test_an_unknown_algorithm_is_refused(files):
    with pytest.raises(BadSetting, match="FEWSTEP_C2PA_ALGORITHM is 'rsa'"):
        Settings(c2pa_algorithm="rsa")


def test_a_missing_package_is_said_at_the_start(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(BadSetting, match=r"pip install 'fewstep\[c2pa\]'"):
        signatory(Settings(c2pa_chain=files["chain"], c2pa_key=files["key"]), "0")
