"""The roles that a bundle's networks play behind an engine. No torch here; the table is in `fewstep.runtime.engine`."""

TEXT, DENOISER, DENOISER_CONTROL = "text", "denoiser", "denoiser+control"
DENOISER_ADAPTER, DENOISER_IMAGE_PROMPT = "denoiser+adapter", "denoiser+image-prompt"
DENOISER_NEGATIVE, DENOISER_LORA = "denoiser+negative", "denoiser+lora"
CONTROLNET, ADAPTER, IMAGE_PROMPT = "controlnet", "adapter", "image-prompt"
DECODER, DECODER_TINY, ENCODER = "decoder", "decoder+tiny", "encoder"
PICTURE = "picture"
"""Text to pixels in one graph, `picture` for one step, `picture-4` for four; offered where it was exported
(`Bundle.extra_roles`)."""


def picture_role(steps: int) -> str:
    return PICTURE if steps == 1 else f"{PICTURE}-{steps}"


def picture_steps(role: str) -> int | None:
    """The step count of a `picture` role; None for any other role."""
    name, _, steps = role.partition("-")
    return None if name != PICTURE or not (steps or "1").isdecimal() else int(steps or "1")


DENOISERS = (
    DENOISER, DENOISER_CONTROL, DENOISER_ADAPTER, DENOISER_IMAGE_PROMPT, DENOISER_LORA, DENOISER_NEGATIVE,
)  # fmt: skip
ROLES = (TEXT, *DENOISERS, CONTROLNET, ADAPTER, IMAGE_PROMPT, DECODER, DECODER_TINY, ENCODER)

NEEDS = {
    DENOISER_CONTROL: "controlnet", CONTROLNET: "controlnet",
    DENOISER_ADAPTER: "t2i_adapter", ADAPTER: "t2i_adapter",
    DENOISER_IMAGE_PROMPT: "ip_adapter", IMAGE_PROMPT: "ip_adapter",
    DENOISER_LORA: "loras",
    DENOISER_NEGATIVE: "negative",
    DECODER_TINY: "tiny_decoder",
}  # fmt: skip
"""The component beside the pipeline's own that a role needs; roles not listed are there in every bundle."""
