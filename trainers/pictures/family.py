"""The networks of the built-in `scenes` family, in diffusers' own classes, and nothing else.

Sizes are chosen so that the whole family trains on two CPU cores in under two hours: a 64x64 picture is an 8x8 latent
of 8 channels (autoencoder factor 8), and the denoiser has about 3.5 million weights.
"""

import itertools
from pathlib import Path

from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import scenes

LATENT_CHANNELS = 8
LATENT_SIZE = scenes.SIZE // 8
TOKENS = 40
TEXT_WIDTH = 128


def build_autoencoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 2, 2),
        num_decoder_blocks=(2, 2, 2, 1),
    )


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary holds every caption word as one token, and single characters for the rest.

    CLIP's byte-pair merges are learned on the caption words until each word is one token; an unknown word falls
    apart into smaller pieces, and is still accepted.
    """
    vocab, merges = _byte_pairs([w for w in scenes.words() if w.isalpha()])
    folder.mkdir(parents=True, exist_ok=True)
    table = {token: i for i, token in enumerate([*vocab, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=table, merges=merges, model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(**changes: object) -> UNet2DConditionModel:
    """The denoiser. `time_cond_proj_dim=256` adds the guidance-scale input of LCM students."""
    settings: dict[str, object] = {
        "sample_size": LATENT_SIZE,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": (80, 112),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def build_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet on edge pictures, started from the denoiser's own encoder."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32, 64))


def _byte_pairs(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Byte-pair encoding (Sennrich et al. 2016) run until every word is one symbol; returns vocabulary and merges."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.-'!?:;()/&+"]
    vocab = letters + [c + "</w>" for c in letters]
    split = [[*w[:-1], w[-1] + "</w>"] for w in words]
    merges: list[tuple[str, str]] = []
    while any(len(s) > 1 for s in split):
        counts: dict[tuple[str, str], int] = {}
        for symbols in split:
            for pair in itertools.pairwise(symbols):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        vocab.append("".join(best))
        split = [_merge(symbols, best) for symbols in split]
    return list(dict.fromkeys(vocab)), merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out
