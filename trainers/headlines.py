"""What papers report of their own methods: facts, each with what it was measured on, to stand beside our own figures.

FID, lower is better, at 1 / 2 steps unless said. "Recalled" marks digits that were not read in the source again.
"""

HEADLINES: dict[str, str] = {
    "cd": "CIFAR-10 3.55 / 2.93; ImageNet-64 6.20 / 4.70",
    "ct": "CIFAR-10 8.70 / 5.83; ImageNet-64 13.0 / 11.1",
    "ict": "CIFAR-10 2.51 / 2.24; ImageNet-64 3.25 / 2.77",
    "ect": "CIFAR-10 3.60 / 2.11; ImageNet-64 4.05 at 1 step",
    "sct": "ImageNet-64 2.42 / 1.55",
    "slct": "FFHQ-256 8.72 / 8.29; LSUN-Church 8.87 / 7.71",
    "vct": "CIFAR-10: best of consistency training without a teacher at 2 steps (abstract)",
    "direct-cm": "smaller ODE error than CD, and worse FID and CLIP score",
    "lcm": "LAION-Aesthetics-768, 4 steps: 11.10 (recalled)",
    "multistep-cm": "8 steps: ImageNet-64 1.4, ImageNet-128 2.1",
    "mlcm": "SDXL, 4 steps: CLIP score 33.30, aesthetic 6.19, ImageReward 1.20",
    "tcd": "SDXL: better than LCM at 4 and at 20 steps",
    "pcm": "Stable Diffusion: better than LCM at 1 to 16 steps",
    "scm": "CIFAR-10 2.85 / 2.06; ImageNet-64 2.04 / 1.48; ImageNet-512 2.28 / 1.88",
    "sana-sprint": "MJHQ, 1 step: 7.59, GenEval 0.74 (with its GAN)",
    "tbcm": "MJHQ, 1 step: 6.52, CLIP score 28.08",
    "imm": "ImageNet-256, 8 steps: 1.99; CIFAR-10, 2 steps: 1.98",
    "freeflow": "1 step: ImageNet-256 1.45, ImageNet-512 1.49",
    "anyflow": "video: level with consistency students at 4 steps, better with more",
    "twinflow": "GenEval 0.83 at 1 step",
    "boot": "1 step, recalled: FFHQ-64 9.0, CIFAR-10 4.38, ImageNet-64 16.3",
    "consistency-fm": "CIFAR-10, 2 steps: 5.34 (recalled); trains 4.4 times faster than CD",
    "instaflow": "COCO, 5000 pictures, 1 step: 23.3; 30,000 pictures: 13.1",
    "rf++": "CIFAR-10, 1 step: up to 72 % lower than reflow's",
    "progressive": "CIFAR-10: 9.12 / 4.51, 3.0 at 4 steps, 2.57 at 8",
    "agd": "FID level with guidance or better at half the evaluations; 1 to 5 % more weights",
    "lora-guided": "half of the evaluations, half of the memory of distilling the whole network",
    "lcsc": "CIFAR-10: CD at 1 step better than its base at 2; 23 times less training",
    "imagine-flash": "Emu: 3 steps level with the teacher",
    "slim": "CIFAR-10, 1 step: 5.02 with 15.7 million weights",
    "edgefusion": "2 steps, in eight-bit weights on an NPU",
}
"""By recipe; none where no figure of the paper was at hand."""
