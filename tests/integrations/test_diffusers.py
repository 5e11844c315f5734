"""diffusers: a quantized model saves itself and loads again with the same bits, or is refused."""

import copy

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import qkernels as qk

pytest.importorskip("diffusers")
import diffusers
from diffusers import UNet2DConditionModel

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
CONTEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))


def build() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    ).eval()  # fmt: skip


@torch.no_grad()
def output(model):
    dtype = model.conv_in.weight.dtype
    return model(X.to(dtype), torch.tensor([3]), CONTEXT.to(dtype)).sample


def kinds(model):
    layers = {name: module for name, module in model.named_modules() if isinstance(module, qk.QuantLinear)}
    return {name: (layer.scheme.name, layer.mode) for name, layer in layers.items()}


@pytest.mark.parametrize("mode", ["frozen", "int8", "qat"])
def test_saved_and_loaded_with_the_same_bits(mode, tmp_path):
    model = build()
    qk.quantize_(model, "w8a8", mode)
    model.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert kinds(again) == kinds(model) != {}
    assert_same_bits(output(again), output(model))


def test_a_model_edited_since_saves_what_it_is(tmp_path):
    model = build()
    qk.quantize_(model, "w8a8", include=["down_blocks.*"])
    attention = model.up_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_q = qk.QuantLinear.from_float(attention.to_q, "w4a16-g32")
    model.time_embedding.linear_1 = nn.Linear(16, 64)
    model.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert kinds(again) == kinds(model)
    assert_same_bits(output(again), output(model))
    qk.dequantize_(again)
    again.save_pretrained(tmp_path)
    assert kinds(UNet2DConditionModel.from_pretrained(tmp_path)) == {}


def test_quantized_as_it_is_loaded_and_scales_stay_float32(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "float")
    loaded = UNet2DConditionModel.from_pretrained(
        tmp_path / "float", quantization_config=qk.QKernelsConfig("w4a8-g32"), torch_dtype=torch.bfloat16
    )
    assert set(kinds(loaded).values()) == {("w4a8-g32", "frozen")} and loaded.quantization_report.quantized
    loaded.save_pretrained(tmp_path / "quantized")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "quantized", torch_dtype=torch.bfloat16)
    assert {m.scales.dtype for m in again.modules() if isinstance(m, qk.QuantLinear)} == {torch.float32}
    assert_same_bits(output(again), output(loaded))


def test_a_folder_that_does_not_name_its_layers_is_refused(tmp_path):
    model = build()
    qk.quantize_(model, "w8a8")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    name = "time_embedding.linear_1"
    (tmp_path / "config.json").write_text(text.replace(f'"{name}"', f'"{name}x"'))
    with pytest.raises(ValueError, match=f"names the quantized layer {name}x, which UNet2DConditionModel lacks"):
        UNet2DConditionModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text.replace(f'"{name}": "w8a8",', ""))
    with pytest.raises(ValueError, match=f"does not name: .*{name}.qweight"):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_lora_is_loaded_into_a_quantized_flux_transformer():
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    sizes = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16)
    sizes |= dict(num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8])
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**sizes)
    trained = copy.deepcopy(model)
    trained.add_adapter(LoraConfig(target_modules=["to_q", "to_k"], init_lora_weights=False))
    adapter = {f"transformer.{name}": tensor for name, tensor in get_peft_model_state_dict(trained).items()}
    qk.quantize_(model, "w8a8")
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler=scheduler, transformer=model, **parts)
    pipe.load_lora_weights(dict(adapter))
    loaded = get_peft_model_state_dict(pipe.transformer, adapter_name=pipe.get_active_adapters()[0])
    assert all(torch.equal(tensor, adapter[f"transformer.{name}"]) for name, tensor in loaded.items()) and loaded
    fused = diffusers.FluxTransformer2DModel(**sizes)
    qk.quantize_(fused, "w8a8")
    fused.fuse_qkv_projections()
    attention = fused.transformer_blocks[0].attn
    expected = torch.cat([layer.dequantize() for layer in (attention.to_q, attention.to_k, attention.to_v)])
    assert torch.equal(attention.to_qkv.weight, expected)


@pytest.mark.parametrize("how", ["mapping", "backend"])
def test_pipelines_quantize_their_parts(how, tmp_path):
    pipeline = diffusers.DDPMPipeline(build_unconditional(), diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "float")
    scheme = {"*.to_q": "w4a16", "*": "w8a8"}
    if how == "mapping":
        options = {"quant_mapping": {"unet": qk.QKernelsConfig(scheme, embeddings=True)}}
    else:
        kwargs = {"scheme": scheme, "embeddings": True}
        options = {"quant_backend": "qkernels", "quant_kwargs": kwargs, "components_to_quantize": ["unet"]}
    config = diffusers.PipelineQuantizationConfig(**options)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path / "float", quantization_config=config)
    assert {name for name, _ in kinds(loaded.unet).values()} == {"w4a16", "w8a8"}
    assert isinstance(loaded.unet.class_embedding, qk.QuantEmbedding)
    loaded.save_pretrained(tmp_path / "quantized")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "quantized")
    x = (torch.randn(1, 3, 8, 8), 3, torch.tensor([2]))
    with torch.no_grad():
        assert_same_bits(again.unet(*x).sample, loaded.unet(*x).sample)


def build_unconditional():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=5,
    ).eval()  # fmt: skip
