"""The artifact that training writes, export extends and the server reads: weights plus their sampling contract.

A bundle is a diffusers pipeline folder (`unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`, `controlnet/`,
`model_index.json`) with a `bundle.json` that holds the `SamplerSpec` and a SHA-256 of every file that was there when it
was sealed. Only safetensors and JSON are read, so loading runs no code from the folder. Exported engines in `engines/`
are not loaded with it; some are native code, which runs only where it was built or such an engine is
asked for by name (`fewstep.runtime.engines.built`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BundleError, SpecError
from .files import PARTIAL, sha256_of, write_whole
from .pipeline_folder import SECOND_TIME, read_config
from .roles import CONTROLNET, DECODER, DENOISER, ENCODER, NEEDS, ROLES, TEXT, picture_role, picture_steps
from .spec import SamplerSpec

if TYPE_CHECKING:
    from .denoiser import Denoiser
    from .families import Family, Load
    from .networks import ControlNet, Decoder, Encoder

BUNDLE_VERSION = 1
MOST_UNROLLED = 4
"""Steps that one graph may hold: it has the denoiser's operations once for each."""
REFERENCE = Path(__file__).parent / "reference"
_CODE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".so"}
_UNSEALED = {"bundle.json", f"bundle.json{PARTIAL}", "engines"}
"""Not covered by the digests: the seal itself, and engines, which carry digests of their own."""


class Bundle:
    """An opened, checked bundle. Networks are loaded when first asked for, in float32, ready for evaluation."""

    def __init__(self, root: Path, name: str, spec: SamplerSpec) -> None:
        self.root = root
        self.name = name
        self.spec = spec

    def has(self, component: str) -> bool:
        return (self.root / component / "config.json").is_file()

    @cached_property
    def weights_digest(self) -> str:
        """One SHA-256 over the networks' weights and settings: what an engine was made from."""
        files = json.loads((self.root / "bundle.json").read_text())["files"]
        made_from = {n: d for n, d in files.items() if n.endswith((".safetensors", "/config.json"))}
        parts = sorted(f"{name}:{digest}" for name, digest in made_from.items() if not name.startswith("golden/"))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        return self._open_tokenizer("tokenizer")

    def tokenizers(self) -> tuple[Any, ...]:
        """The tokenizer of each of `spec.text`."""
        folders = [text.tokenizer for text in self.spec.text]
        return tuple(self.tokenizer if name == "tokenizer" else self._open_tokenizer(name) for name in folders)

    def _open_tokenizer(self, folder: str) -> Any:
        """Padding goes to the right whatever its class would do, as in diffusers' pipelines."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.root / folder, local_files_only=True, padding_side="right")

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that its networks can play, in the order of `fewstep.models.roles`."""
        return tuple(role for role in ROLES if role not in NEEDS or self.has(NEEDS[role]))

    def config(self, component: str) -> dict[str, Any]:
        """A component's settings.

        Errors: `BundleError` where there are none.
        """
        return read_config(self.root, component)

    @property
    def size_unit(self) -> int:
        """Pixels that a picture's sides are multiples of: of one latent, times the denoiser's own stride."""
        return self.spec.latent.factor * self.family.stride(self.config(self.family.folder))

    @property
    def image_layers(self) -> int:
        """How many cross-attentions hear a picture prompt; 0 without an IP-Adapter."""
        return len(self.load("ip_adapter").attention) // 2 if self.has("ip_adapter") else 0

    @property
    def lora_names(self) -> tuple[str, ...]:
        """LoRAs that are mixed row by row (`fewstep.models.net_lora`), by name."""
        from .net_lora import lora_names

        return lora_names(self.root / "loras") if self.has("loras") else ()

    @property
    def extra_roles(self) -> tuple[str, ...]:
        """Roles that are other forms of the same work, offered where an engine was exported with them: `picture` and
        `picture-N`, the whole of a request of 1 or N steps without guidance pairs."""
        spec = self.spec
        if spec.guidance.mode == "cfg" or spec.clip is not None or spec.sampler == "dpmpp-2m":
            return ()
        return tuple(picture_role(steps) for steps in spec.steps if steps <= MOST_UNROLLED)

    @cached_property
    def family(self) -> "Family":
        from .families import find_family

        return find_family(self.root)

    def network(self, role: str, load: "Load | None" = None) -> Any:
        """The network of a role, with `inputs` and `outputs` (`fewstep.models.networks`), float32, for evaluation.

        load: gives a component by name, to share components between roles (`functools.cache(bundle.load)`).

        Errors: those of `load`.
        """
        load = load or self.load
        steps = picture_steps(role)
        if steps is None:
            return self.family.network(role, load)
        from .net_picture import TextToPixels

        parts = [self.family.network(part, load) for part in (TEXT, DENOISER, self.spec.decoder_role(steps))]
        return TextToPixels(*parts, steps=steps).eval()

    def denoiser_net(self) -> Any:
        return self.network(DENOISER)

    def denoiser(self, *, control: bool = False) -> "Denoiser":
        from .denoiser import Denoiser
        from .networks import as_network

        net = as_network(self.denoiser_net(), self.controlnet() if control else None)
        return Denoiser(net, self.spec.path, self.spec.prediction)

    def controlnet(self) -> "ControlNet":
        return self.network(CONTROLNET)  # type: ignore[no-any-return]

    def decoder(self) -> "Decoder":
        return self.network(DECODER)  # type: ignore[no-any-return]

    def encoder(self) -> "Encoder":
        return self.network(ENCODER)  # type: ignore[no-any-return]

    def text_encoder(self) -> Any:
        return self.network(TEXT)

    def load(self, component: str) -> Any:
        """A component as its class, float32, with every weight present.

        Errors: `BundleError` where the component is absent, its class unknown, or a weight missing or unexpected.
        """
        return load_component(self.root, component)


def load_component(root: Path, component: str) -> Any:
    """A component of a bundle or diffusers folder, as `Bundle.load` gives it.

    Errors: `BundleError` where the component is absent, its class unknown, or a weight missing or unexpected.
    """
    folder = root / component
    if not (folder / "config.json").is_file():
        raise BundleError(f"{root} has no {component}/config.json; this folder cannot do what was asked")
    import diffusers
    import torch
    import transformers

    from .altered import alterations, load_altered
    from .own_components import OWN

    config = read_config(root, component)
    name = config.get("_class_name") or (config.get("architectures") or ["?"])[0]
    if name in OWN:
        return OWN[name](folder)
    cls = getattr(diffusers, name, None) or getattr(transformers, name, None)
    if cls is None:
        raise BundleError(f"{folder}/config.json names the class {name!r}; neither diffusers nor transformers has it")
    if alterations(config):
        return load_altered(cls, folder, config)
    try:
        model, report = cls.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # absent or unreadable weights, or weights of another shape
        raise BundleError(f"{folder} cannot be loaded: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := report.get(problem):
            raise BundleError(f"{folder} has {problem.replace('_', ' ')} {sorted(map(str, keys))[:3]}; save it anew")
    return model.requires_grad_(False).eval()


def as_bundle(found: "str | Path | Bundle") -> Bundle:
    """A bundle that is open already, or the one at a path or of a shipped name. Errors: those of `load_bundle`."""
    return found if isinstance(found, Bundle) else load_bundle(found)


def load_bundle(where: str | Path, *, check_digests: bool = True) -> Bundle:
    """Open a bundle folder, or a shipped bundle by its short name (`scenes-lcm`).

    Errors: `BundleError` naming the missing file, the changed file, the unknown version, or the file that holds code;
    `SpecError` naming the field of the spec.
    """
    root = find_bundle(where)
    try:
        data = json.loads((root / "bundle.json").read_text())
    except FileNotFoundError:
        raise BundleError(
            f"{root} has no bundle.json; make a bundle with `fewstep import` or `fewstep distill`"
        ) from None
    except ValueError as error:
        raise BundleError(f"{root}/bundle.json is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BundleError(f"{root}/bundle.json must hold an object")
    if data.get("version") != BUNDLE_VERSION:
        raise BundleError(
            f"{root}/bundle.json has version {data.get('version')!r}; this reads {BUNDLE_VERSION}: upgrade fewstep"
        )
    for key in ("name", "spec", "files"):
        if key not in data:
            raise BundleError(f"{root}/bundle.json has no field {key!r}")
    if not isinstance(data["files"], dict) or not all(isinstance(digest, str) for digest in data["files"].values()):
        raise BundleError(f"{root}/bundle.json: files must map each file's name to its SHA-256; seal the bundle again")
    _refuse_code(root)
    _check_files(root, data["files"], check_digests)
    try:
        spec = SamplerSpec.from_json(data["spec"])
    except SpecError as error:
        raise SpecError(f"{root}/bundle.json: spec.{error}") from error
    if spec.tiny_decoder and not (root / "tiny_decoder" / "config.json").is_file():
        steps = list(spec.tiny_decoder)
        raise BundleError(f"{root}/bundle.json: spec.tiny_decoder is {steps}, and tiny_decoder/ is absent")
    _check_second_time(root, spec)
    return Bundle(root, str(data["name"]), spec)


def _check_second_time(root: Path, spec: SamplerSpec) -> None:
    folder = next((name for name in ("unet", "transformer") if (root / name / "config.json").is_file()), None)
    takes = folder is not None and SECOND_TIME in read_config(root, folder)
    if folder is not None and takes != spec.second_time:
        has = "has" if takes else "lacks"
        raise BundleError(
            f"{root}/bundle.json: spec.second_time is {spec.second_time}, and {folder}/config.json {has} the field "
            f"{SECOND_TIME}; export the student again"
        )


def find_bundle(where: str | Path) -> Path:
    """The folder of a path or of a shipped short name; a path that exists wins."""
    path = Path(where)
    if path.is_dir():
        return path
    if path.name == str(where) and (REFERENCE / path.name).is_dir():
        return REFERENCE / path.name
    shipped = sorted(p.name for p in REFERENCE.iterdir() if p.is_dir()) if REFERENCE.is_dir() else []
    raise BundleError(f"{where} is not a folder; shipped bundles are {', '.join(shipped) or '(none)'}")


def seal_bundle(
    root: Path,
    name: str,
    spec: SamplerSpec,
    *,
    sources: Sequence[Mapping[str, Any]] = (),
    known: Mapping[str, str] | None = None,
) -> Bundle:
    """Write `bundle.json` over a folder whose files are final, and open it.

    sources: what was put in from elsewhere (a LoRA's file, digest and weight), kept for the reader. known: digests that
    files have already; the others' are taken.
    """
    _refuse_code(root)
    _forget_origins(root)
    digests = known or {}
    files = {f: digests.get(f) or sha256_of(root / f) for f in _sealed_files(root)}
    data = {"version": BUNDLE_VERSION, "name": name, "spec": spec.to_json(), "files": files}
    if sources:
        data["sources"] = [dict(source) for source in sources]
    write_whole(root / "bundle.json", (json.dumps(data, indent=1) + "\n").encode())
    return load_bundle(root, check_digests=False)  # they were taken just now, or are to stay as they were


def reseal(bundle: Bundle, **changes: Any) -> Bundle:
    """The same folder with fields of its spec replaced (quality, golden cases), and what lies in `golden/` now.

    Every other file keeps the digest that it was sealed with: a weight that was damaged since is not sealed as whole.
    """
    data = json.loads((bundle.root / "bundle.json").read_text())
    known = {file: digest for file, digest in data["files"].items() if not file.startswith("golden/")}
    spec = replace(bundle.spec, **changes)
    return seal_bundle(bundle.root, bundle.name, spec, sources=data.get("sources", []), known=known)


def _forget_origins(root: Path) -> None:
    """Drop the path a component was loaded from, which diffusers keeps in its config: it says nothing elsewhere."""
    for path in sorted(root.glob("*/config.json")):
        config = json.loads(path.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def _sealed_files(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and relative.parts[0] not in _UNSEALED:
            yield relative.as_posix()


def find_code(root: Path, folders: Sequence[str] | None = None) -> Path | None:
    """The first file that may hold code (a pickle, a script) in a folder, or in those of its sub-folders."""
    for folder in [root] if folders is None else [root / name for name in folders]:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in _CODE_SUFFIXES and path.relative_to(root).parts[0] != "engines":
                return path
    return None


def _refuse_code(root: Path) -> None:
    if (path := find_code(root)) is not None:
        raise BundleError(
            f"{path} may hold code; a bundle holds only safetensors and JSON. Convert the weights and delete it"
        )


def _check_files(root: Path, files: dict[str, str], check_digests: bool) -> None:
    for name, digest in files.items():
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            raise BundleError(f"{root}/bundle.json lists {name!r}, which lies outside the bundle")
        if not path.is_file():
            raise BundleError(f"{root} lacks {name}, which bundle.json lists; copy the bundle again")
        if check_digests and sha256_of(path) != digest:
            raise BundleError(f"{path} changed since the bundle was sealed (wrong SHA-256); copy the bundle again")
    for name in _sealed_files(root):
        if ".safetensors" in name and name not in files:
            raise BundleError(f"{root}/{name} is not listed in bundle.json; seal the bundle again")
