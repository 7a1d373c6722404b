"""The roles that a bundle's networks play behind an engine. No torch here; the table is in `fewstep.runtime.engine`."""

TEXT, DENOISER, DENOISER_CONTROL = "text", "denoiser", "denoiser+control"
CONTROLNET, DECODER, ENCODER = "controlnet", "decoder", "encoder"
ROLES = (TEXT, DENOISER, DENOISER_CONTROL, CONTROLNET, DECODER, ENCODER)
