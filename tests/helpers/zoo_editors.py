"""DreamLite, JoyImage-Edit and VisualCloze."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pipelines
import torch
from stand_in_text import Letters, Reader
from zoo import Case, assembled, picture, random_


def _dream_lite(kind: str) -> Any:
    unet = diffusers.DreamLiteUNetModel(
        sample_size=8, block_out_channels=(8, 16), cross_attention_dim=32, attention_head_dim=8,
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    return assembled(
        kind,
        text_encoder=Reader(),
        tokenizer=Letters(),
        processor=Letters(),
        vae=random_(vae, 2),
        unet=random_(unet, 1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def dream_lite() -> Case:
    pipe = _dream_lite("DreamLitePipeline")
    arguments = dict(prompt="a dog", image=picture(16), height=16, width=16, output_type="latent")
    return Case(pipe, arguments)


def dream_lite_mobile() -> Case:
    arguments = dict(prompt="a dog", height=16, width=16, output_type="latent")
    return Case(_dream_lite("DreamLiteMobilePipeline"), arguments)


class _HookedReader(Reader):
    """JoyImage takes the hidden states from the last layer, by a hook."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        layers = [torch.nn.Identity()]
        self.model = SimpleNamespace(language_model=SimpleNamespace(layers=layers))

    def forward(self, *args: Any, **options: Any) -> Any:
        read = super().forward(*args, **options)
        self.model.language_model.layers[-1](read.last_hidden_state)
        return read


def _joy(kind: str, transformer: Any) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    pipe = assembled(
        kind,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
        vae=random_(vae, 2),
        text_encoder=_HookedReader(16),
        tokenizer=Letters(),
        transformer=random_(transformer, 1),
        processor=Letters(),
    )
    # They allow no sizes but some of about 1024 x 1024 pixels.
    for name in ("image_processor", "vae_image_processor"):
        if hasattr(pipe, name):
            getattr(pipe, name).get_default_height_width = lambda *unused: (32, 32)
    return pipe


_JOY = dict(
    in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=1,
    rope_dim_list=[4, 6, 6],
)  # fmt: skip


def joy_image_edit() -> Case:
    pipe = _joy("JoyImageEditPipeline", diffusers.JoyImageEditTransformer3DModel(**_JOY))
    return Case(
        pipe, dict(image=picture(32), prompt="a dog", height=32, width=32, output_type="latent")
    )


def joy_image_edit_plus() -> Case:
    transformer = diffusers.JoyImageEditPlusTransformer3DModel(**_JOY)
    pipe = _joy("JoyImageEditPlusPipeline", transformer)
    images = [picture(32), picture(32, 1)]
    return Case(
        pipe, dict(images=images, prompt="a dog", height=32, width=32, output_type="latent")
    )


def _visual_cloze(kind: str) -> Any:
    # As of FLUX.1 Fill: latents, the masked image's latents, and the mask's pixels.
    transformer = pipelines.flux_transformer(in_channels=16 + 16 + 16, out_channels=16)
    return assembled(
        kind,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=pipelines.vae(),
        text_encoder=Reader(16),
        tokenizer=Letters(),
        text_encoder_2=Reader(32),
        tokenizer_2=Letters(),
        transformer=transformer,
        resolution=32,
    )


def _cloze_arguments() -> dict[str, Any]:
    return dict(
        task_prompt="from depth to image",
        content_prompt="a lake",
        image=[[picture(32), picture(32, 1)], [picture(32, 2), None]],
        max_sequence_length=32,
        output_type="latent",
    )


def visual_cloze_generation() -> Case:
    return Case(_visual_cloze("VisualClozeGenerationPipeline"), _cloze_arguments())


def visual_cloze() -> Case:
    more = dict(upsampling_height=32, upsampling_width=32, upsampling_strength=0.6)
    pipe = _visual_cloze("VisualClozePipeline")
    for inner in (pipe.generation_pipe, pipe.upsampling_pipe):
        inner.set_progress_bar_config(disable=True)
    return Case(
        pipe,
        _cloze_arguments() | more,
        note="two pipelines inside, which have the scheduler",
    )


CASES = {
    "DreamLitePipeline": dream_lite,
    "DreamLiteMobilePipeline": dream_lite_mobile,
    "JoyImageEditPipeline": joy_image_edit,
    "JoyImageEditPlusPipeline": joy_image_edit_plus,
    "VisualClozeGenerationPipeline": visual_cloze_generation,
    "VisualClozePipeline": visual_cloze,
}
