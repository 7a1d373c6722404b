"""A diffusers folder becomes a bundle: its networks checked, its sampling contract written down, nothing guessed.

What the folder states is read; what it does not state (step counts, guidance, a student's own times) is asked for by
name with the known answer suggested (`fewstep.models.known`).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .adopting import (
    adopt_controlnet,
    adopt_decoder,
    adopt_ip_adapter,
    adopt_negative,
    adopt_t2i_adapter,
    control_kinds,
)
from .bundle import Bundle, find_code, seal_bundle
from .errors import BundleError, SpecError
from .families import Facts, Family, find_family
from .known import Answers, known, suggestion
from .net_negative import Negative
from .pipeline_folder import BESIDE, SECOND_TIME, list_component, read_config, read_index
from .schedulers import PREDICTION_TYPES, Wanted, replaced_scheduler, sampling_of
from .spec import Guidance, SamplerSpec

VARIANTS = (".fp16.", ".bf16.", ".non_ema.", ".fp32.")
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Additions:
    """What is put into the folder from elsewhere (`fewstep.models.adopting`, `fewstep.models.lora`).

    loras: files with the weight that each is merged with. row_loras: (name, file) of those that stay beside the weights
    and are mixed by request. decoder: a tiny autoencoder in place of the folder's own. control_kinds: names of a
    ControlNet-Union's control types. image_encoder: what the IP-Adapter reads. negative: "nag" or "nasa", how negative
    prompts are taken without a second evaluation.
    """

    loras: tuple[tuple[Path, float], ...] = ()
    row_loras: tuple[tuple[str, Path], ...] = ()
    decoder: Path | None = None
    controlnet: Path | None = None
    control_kinds: tuple[str, ...] = ()
    t2i_adapter: Path | None = None
    ip_adapter: Path | None = None
    image_encoder: Path | None = None
    negative: str | None = None


def import_folder(
    source: Path,
    out: Path,
    *,
    answers: Answers = Answers(),  # noqa: B008
    additions: Additions = Additions(),
    name: str | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    progress: Progress | None = None,
) -> Bundle:
    """Write the bundle `out` from the diffusers folder `source`, and load every network once.

    sizes: (width, height) it shall serve; the trained one where left out. What was put in is kept as the bundle's
    `sources`. Weight files that stay as they are become hard links where the file system allows it.

    Errors: `BundleError` naming the file, setting or missing answer and its remedy. `out` appears only when whole.
    """
    tell = progress or (lambda part: None)
    _check_source(source, out)
    family = find_family(source)
    read_spec(source, family, answers, sizes)  # refuse before anything is written
    beside = out.with_name(out.name + ".importing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        tell("copy")
        _copy(source, beside)
        _write_scheduler(beside, answers)
        sources = _add(beside, additions, tell)
        spec = read_spec(
            beside, family, replace(answers, sampler=None, prediction=None), sizes, additions.control_kinds
        )
        bundle = seal_bundle(beside, name or out.name, spec, sources=sources)
        for role in bundle.roles:
            tell(role)
            bundle.network(role)
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return Bundle(out, bundle.name, spec)


def import_checkpoint(source: Path, out: Path, *, config: Path | None = None, **settings: Any) -> Bundle:
    """`import_folder` of a folder, or of one .safetensors file read with the settings of the diffusers folder `config`.

    Errors: `BundleError`; also where `config` is missing for a file, or given for a folder.
    """
    if not source.exists():
        raise BundleError(f"{source} is not there; name a diffusers folder or a .safetensors checkpoint")
    if source.is_dir() and config is None:
        return import_folder(source, out, **settings)
    if source.is_dir() or config is None:
        wrong = f"--config is {config}, and {source} is a folder with settings of its own: leave it out"
        need = f"{source} is a single file: say --config DIR, a local diffusers folder of its base, for its settings"
        raise BundleError(wrong if source.is_dir() else need)
    from .single_file import open_single_file

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=out.name + ".opening") as scratch:
        return import_folder(open_single_file(source, Path(scratch) / "folder", config), out, **settings)


def read_spec(
    root: Path,
    family: Family,
    answers: Answers,
    sizes: Sequence[tuple[int, int]] = (),
    kinds: Sequence[str] = (),
) -> SamplerSpec:
    """The sampling contract of a diffusers folder and the answers to what it does not say.

    Errors: `BundleError`, also for a `SpecError` of what came out.
    """
    facts, denoiser = family.facts(root), read_config(root, family.folder)
    steps = answers.steps or tuple(sorted(answers.grids))
    if not steps:
        raise BundleError(
            f"{root} does not state the step counts it is for: say --steps 1,2,4 or the like; {suggestion(family.name)}"
        )
    guidance = _guidance(root, family, facts, answers, family.takes_w(denoiser))
    config = stated_scheduler(read_config(root, "scheduler", "scheduler_config.json"), answers)
    served = tuple(sizes) or (facts.size,)
    unit = facts.latent.factor * family.stride(denoiser)
    for width, height in served:
        if width % unit or height % unit:
            raise BundleError(
                f"--size is {width}x{height}; each side of a {family.name} picture is a multiple of {unit}"
            )
    if len(served) > 1 and config.get("use_dynamic_shifting"):
        raise BundleError("this scheduler's times depend on the picture's size: import it once for each --size")
    wanted = Wanted(
        steps=tuple(sorted(steps)), size=served[0], grids=answers.grids, gamma=answers.gamma, set_times=family.set_times
    )
    try:
        return SamplerSpec(
            **sampling_of(config, wanted), guidance=guidance, latent=facts.latent, sizes=served, text=facts.text,
            size_ids=facts.size_ids, control_kinds=control_kinds(root, kinds), recipe="imported",
            second_time=SECOND_TIME in denoiser,
        )  # fmt: skip
    except SpecError as error:
        raise BundleError(f"{root} gives no sampling contract: {error}") from error


def _guidance(root: Path, family: Family, facts: Facts, answers: Answers, takes_w: bool) -> Guidance:
    given = answers.guidance
    if given is None:
        why = "its network takes the guidance scale" if takes_w else "guidance may be gone or still to be applied"
        shape = "embedded:DEFAULT:LOW-HIGH" if takes_w else "none or --guidance cfg:DEFAULT:LOW-HIGH"
        raise BundleError(
            f"{root} does not state its guidance ({why}): say --guidance {shape}; {suggestion(family.name)}"
        )
    if takes_w != (given.mode == "embedded"):
        has = "takes" if takes_w else "does not take"
        raise BundleError(f"guidance is {given.mode!r}, but the network of {root} {has} the guidance scale as an input")
    zeros = facts.zero_empty and given.mode == "cfg"
    return Guidance(mode=given.mode, default=given.default, range=given.range, zero_empty=zeros)


def _add(root: Path, additions: Additions, tell: Progress) -> list[dict[str, Any]]:
    """Put the additions into the copied folder, and say what was put in."""
    from .lora import merge_loras, register_lora

    if (additions.ip_adapter is None) != (additions.image_encoder is None):
        raise BundleError("an IP-Adapter needs its image encoder: say both --ip-adapter and --image-encoder")
    if additions.control_kinds and additions.controlnet is None:
        raise BundleError("--control-kinds names the control types of a ControlNet-Union: say --controlnet too")
    sources: list[dict[str, Any]] = []
    if additions.loras:
        tell("loras")
        sources += merge_loras(root, additions.loras)
    sources += [register_lora(root, name, path) for name, path in additions.row_loras]
    for adopt, path in (
        (adopt_decoder, additions.decoder),
        (adopt_controlnet, additions.controlnet),
        (adopt_t2i_adapter, additions.t2i_adapter),
    ):
        if path is not None:
            tell(path.name)
            sources.append(adopt(root, path))
    if additions.ip_adapter is not None and additions.image_encoder is not None:
        sources.append(adopt_ip_adapter(root, additions.ip_adapter, additions.image_encoder))
    if additions.negative is not None:
        sources.append(adopt_negative(root, Negative(method=additions.negative)))
    return sources


def merged_answers(stated: Answers, name: str | None) -> Answers:
    """What the user stated, over what is known of the checkpoint `name`.

    Errors: `BundleError` where the name is unknown, or stated step counts are without their stated times.
    """
    if name is None:
        return stated
    base, values = known(name), {f.name: getattr(stated, f.name) for f in fields(Answers) if f.name != "source"}
    said = {field: value for field, value in values.items() if value not in (None, (), {})}
    if "steps" in said and "grids" not in said and base.grids:
        missing = [n for n in said["steps"] if n not in base.grids]
        if missing:
            raise BundleError(f"--as {name} knows the times of {list(base.grids)} steps, not of {missing}: say --grid")
    return replace(base, **said)


def _check_source(source: Path, out: Path) -> None:
    if not (source / "model_index.json").is_file():
        raise BundleError(f"{source} has no model_index.json; name a diffusers pipeline folder")
    if out.exists():
        raise BundleError(f"{out} exists already; delete it or name another --out")
    if (found := find_code(source, _components(source))) is not None:
        raise BundleError(
            f"{found} may hold code; only safetensors and JSON are read: convert it with "
            "diffusers' save_pretrained(..., safe_serialization=True) and delete it"
        )


def _components(source: Path) -> list[str]:
    index = read_index(source)
    named = [k for k, v in index.items() if isinstance(v, list) and v and v[0] is not None and k not in BESIDE]
    present = [k for k in named if (source / k).is_dir()]
    if missing := sorted(set(named) - set(present)):
        raise BundleError(f"{source}/model_index.json names {missing[0]}, and there is no such folder: complete it")
    return sorted({*present, *(k for k in ("controlnet",) if (source / k).is_dir())})


def _copy(source: Path, out: Path) -> None:
    """Components and the index; of several variants of a weight file the plain one, else the only one, renamed."""
    out.mkdir(parents=True)
    for component in _components(source):
        (out / component).mkdir()
        for path in sorted((source / component).iterdir()):
            target = out / component / path.name
            plain = _plain_name(path.name)
            if plain != path.name:
                if (source / component / plain).is_file():
                    continue
                target = out / component / plain
                if target.exists():
                    raise BundleError(f"{source}/{component} has several variants of {plain}; keep one of them")
            if path.is_file() and path.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model"):
                _link(path, target)
    index = read_index(source)
    index |= {name: [None, None] for name in BESIDE if name in index}
    (out / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def _plain_name(name: str) -> str:
    for variant in VARIANTS:
        name = name.replace(variant, ".")
    return name


def _link(path: Path, target: Path) -> None:
    """A hard link for weights, a copy for what may be edited or where links cannot be."""
    if path.suffix == ".safetensors":
        try:
            os.link(path.resolve(), target)
            return
        except OSError:
            pass
    shutil.copyfile(path, target)


def stated_scheduler(config: dict[str, Any], answers: Answers) -> dict[str, Any]:
    """The folder's scheduler, or what the answers put in its place."""
    if answers.sampler is not None:
        return replaced_scheduler(config, answers.sampler, answers.prediction)
    if answers.prediction is not None:
        return {**config, "prediction_type": PREDICTION_TYPES[answers.prediction]}
    return config


def _write_scheduler(root: Path, answers: Answers) -> None:
    """Keep the stated scheduler in the folder, so that diffusers samples the same way."""
    config = stated_scheduler(read_config(root, "scheduler", "scheduler_config.json"), answers)
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=1) + "\n")
    list_component(root, "scheduler", "diffusers", config["_class_name"])
