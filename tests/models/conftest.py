"""Tiny random checkpoints of every family, each built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
    "max_position_embeddings": 77,
}

QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>"
)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a tiny checkpoint by its pipeline's class name."""
    root = tmp_path_factory.mktemp("checkpoints")

    def build(pipeline: str) -> str:
        folder = root / pipeline
        if not folder.exists():
            from models.loading import be_quiet

            be_quiet()
            BUILDERS[pipeline]().save_pretrained(folder, safe_serialization=True)
        return str(folder)

    return build


def _filled(model: Any, name: str) -> Any:
    """The pack's weights: the same on every machine, and nothing is zero, so that each input reaches the output."""
    from models.pack.tiny import fill_weights

    fill_weights(model, name)
    return model


def _tokenizer(length: int = 24, side: str = "right") -> Any:
    from models.pack.tiny_language import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.padding_side = side
    tokenizer.model_max_length = length
    return tokenizer


def _templated_tokenizer(template: str, tokens: int) -> Any:
    """A tokenizer for which a prompt template's beginning is as many tokens as the pipeline cuts away."""
    from tokenizers import AddedToken

    beginning = template.split("{}")[0]
    for rest in range(1, len(beginning)):
        tokenizer = _tokenizer(4096)
        tokenizer.add_tokens([AddedToken(beginning[:-rest], normalized=False, special=True)], special_tokens=True)
        if len(tokenizer(beginning).input_ids) == tokens:
            return tokenizer
    raise AssertionError(template)


def _t5(kind: str = "T5", d_model: int = 32) -> dict[str, Any]:
    import transformers

    tokenizer = _tokenizer()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        d_model=d_model,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = getattr(transformers, f"{kind}EncoderModel")(config)
    return {"text_encoder": _filled(model, "text_encoder"), "tokenizer": tokenizer}


def _clip(projection: bool = False) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _tokenizer(77)
    ids = {"bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.pad_token_id}
    config = CLIPTextConfig(vocab_size=len(tokenizer), **CLIP, **ids)
    model = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return tokenizer, _filled(model, f"clip{projection}")


def _image_vae(latent_channels: int = 4, **config: Any) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        **config,
    )
    return _filled(vae, "image_vae")


def _wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return _filled(AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1), "vae")


def _wan_transformer(**config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **config,
    )
    return _filled(model, "transformer")


def wan() -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(**_t5("UMT5"), vae=_wan_vae(), transformer=_wan_transformer(in_channels=16), scheduler=scheduler)


def wan_image_to_video() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "intermediate_size": 37, "projection_dim": 32}
    config = CLIPVisionConfig(num_hidden_layers=2, num_attention_heads=4, **vision)
    return WanImageToVideoPipeline(
        **_t5("UMT5"),
        vae=_wan_vae(),
        transformer=_wan_transformer(in_channels=36, image_dim=32, added_kv_proj_dim=24),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        image_encoder=_filled(CLIPVisionModelWithProjection(config), "image_encoder"),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
    )


def ltx() -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.latents_mean[:] = 0.25
    vae.latents_std[:] = 1.5
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    return LTXPipeline(
        **_t5(),
        vae=_filled(vae, "vae"),
        transformer=_filled(transformer, "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
    )


def hunyuan_video() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import LlamaConfig, LlamaModel

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
    )
    template = DEFAULT_PROMPT_TEMPLATE
    tokenizer = _templated_tokenizer(template["template"], template["crop_start"])
    llama = {"hidden_size": 16, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4}
    text_encoder = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **llama))
    tokenizer_2, text_encoder_2 = _clip()
    return HunyuanVideoPipeline(
        text_encoder=_filled(text_encoder, "text_encoder"),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        vae=_filled(vae, "hunyuan_vae"),
        transformer=_filled(transformer, "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def cogvideox(**config: Any) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=24,
        **config,
    )
    return CogVideoXPipeline(
        **_t5(),
        vae=_filled(vae, "cog_vae"),
        transformer=_filled(transformer, "transformer"),
        scheduler=CogVideoXDPMScheduler(
            prediction_type="v_prediction", snr_shift_scale=1.0, rescale_betas_zero_snr=True
        ),
    )


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    tokenizer, text_encoder = _clip()
    t5 = _t5()
    return FluxPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=t5["text_encoder"],
        tokenizer_2=t5["tokenizer"],
        vae=_image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035),
        transformer=_filled(transformer, "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def stable_diffusion_3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    tokenizer, text_encoder = _clip(projection=True)
    t5 = _t5(d_model=64)
    return StableDiffusion3Pipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=t5["text_encoder"],
        tokenizer_3=t5["tokenizer"],
        vae=_image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035),
        transformer=_filled(transformer, "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def stable_diffusion_xl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=1,
    )
    tokenizer, text_encoder = _clip()
    tokenizer_2, text_encoder_2 = _clip(projection=True)
    return StableDiffusionXLPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        vae=_image_vae(),
        unet=_filled(unet, "unet"),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def sana() -> Any:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        patch_size=1,
        sample_size=32,
    )
    tokenizer = _tokenizer(4096)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        head_dim=16,
        hidden_size=8,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return SanaPipeline(
        text_encoder=_filled(Gemma2Model(config), "text_encoder"),
        tokenizer=tokenizer,
        vae=_filled(vae, "dc_vae"),
        transformer=_filled(transformer, "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 1.5, 2.0, 2.5],
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    tokenizer = _templated_tokenizer(QWEN_TEMPLATE, 34)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0},
    }
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return QwenImagePipeline(
        text_encoder=_filled(encoder, "text_encoder"),
        tokenizer=tokenizer,
        vae=_filled(vae, "qwen_vae"),
        transformer=_filled(transformer, "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def kolors_like() -> Any:
    """A pipeline that no family knows: it runs whole."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    tokenizer, text_encoder = _clip()
    return StableDiffusionPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        vae=_image_vae(),
        unet=_filled(unet, "unet"),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "WanPipeline": wan,
    "WanImageToVideoPipeline": wan_image_to_video,
    "LTXPipeline": ltx,
    "HunyuanVideoPipeline": hunyuan_video,
    "CogVideoXPipeline": cogvideox,
    "FluxPipeline": flux,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "SanaPipeline": sana,
    "QwenImagePipeline": qwen_image,
    "StableDiffusionPipeline": kolors_like,
}


@pytest.fixture(scope="session")
def cogvideox_1_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CogVideoX whose denoiser's tokens span two latent frames."""
    folder = tmp_path_factory.mktemp("cogvideox-1.5")
    cogvideox(patch_size_t=2, use_rotary_positional_embeddings=True).save_pretrained(folder)
    return folder
