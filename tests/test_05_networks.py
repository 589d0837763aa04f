"""Chapter 5's networks are Stable Diffusion 1.x: the same numbers, names and tokens as diffusers and transformers give.

Those two packages are references only (tests/requirements.txt); the rest compares with the safetensors package, with a
server on this machine, and with the definitions of LoRA and of weight differences.
"""

import copy
import functools
import itertools
import json
import os
import random
import shutil
import struct
import threading
import unicodedata
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")     # references come from code, never from the network

import diffusers
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from conftest import call, load
from PIL import Image
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

chapter = load("05_text_to_image")
UserError = chapter.UserError


def settings(model):
    """A reference's configuration as its config.json holds it."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return json.loads(json.dumps(config))


def test_parts_of_different_models_are_one_line(layout, tmp_path):
    shutil.copytree(layout, tmp_path / "mixed")
    folder = tmp_path / "mixed" / "text_encoder"
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 24}
    (folder / "config.json").write_text(json.dumps(config))
    chapter.save_safetensors(folder / "model.safetensors", chapter.from_config(chapter.CLIPTextEncoder, config).state_dict())
    with pytest.raises(UserError) as error:
        chapter.load_pipeline(tmp_path / "mixed")
    assert "width {12}" in one_line(error) and "gives 24" in one_line(error)


@torch.no_grad()
def fill(model, seed=0):
    """Every parameter random, so that none hides behind a zero or a one; activations stay of size one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        spread = 0.1 if p.dim() < 2 or "embedding.weight" in name else p[0].numel() ** -0.5
        scale_of_norm = p.dim() < 2 and "norm" in name and "weight" in name
        p.copy_(spread * torch.randn(p.shape, generator=generator) + scale_of_norm)
    return model.eval()


def twin(reference, cls):
    """Our module of the reference's configuration and weights; the names must agree exactly."""
    ours = chapter.from_config(cls, settings(reference))
    state = reference.state_dict()
    if cls is chapter.CLIPTextEncoder:       # transformers 5 keeps its modules without the prefix that the files have
        state = {name if name.startswith("text_model.") else "text_model." + name: t for name, t in state.items()}
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in state.items()}
    ours.load_state_dict(state)
    return ours.to(next(reference.parameters()).dtype)


def noise(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(ours, reference):
    """1e-5 of the largest value in float32; far less in float64, which shows even another epsilon in a norm."""
    tolerance = 1e-5 if reference.dtype == torch.float32 else 1e-9
    assert ours.shape == reference.shape and ours.dtype == reference.dtype
    assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


def one_line(error):
    """The message of a UserError, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


def of_each(cases):
    """Marks a test(name, dtype): once for every case by name, in both precisions, without gradients."""
    def mark(test):
        dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
        return dtypes(pytest.mark.parametrize("name", cases)(torch.no_grad()(test)))
    return mark


# ---- U-Net -----------------------------------------------------------------------------------------------------------


def reference_unet(channels=(8, 16), layers=1, attention=(True, False), heads=2, context=12, groups=4, seed=0, **more):
    kinds = [["DownBlock2D", "CrossAttnDownBlock2D"][reads] for reads in attention]
    return fill(diffusers.UNet2DConditionModel(
        block_out_channels=channels, layers_per_block=layers, attention_head_dim=heads, cross_attention_dim=context,
        norm_num_groups=groups, down_block_types=kinds,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)], **more), seed)


UNETS = {
    "as SD": dict(channels=(8, 16, 24, 24), layers=2, attention=(True, True, True, False)),
    "three levels, other channels": dict(channels=(8, 24, 16), attention=(True, False, True), heads=4, in_channels=5,
                                         out_channels=3, context=7),
    "one level": dict(channels=(16,), layers=3, attention=(True,), heads=1, groups=16),
    "text in the middle only": dict(channels=(12, 24), layers=2, attention=(False, False), heads=3, groups=3),
}
SIZES = [(8, 8), (16, 8), (9, 13), (7, 5), (1, 3)]


@of_each(UNETS)
def test_unet_equals_diffusers(name, dtype):
    reference = reference_unet(**UNETS[name]).to(dtype)
    ours = twin(reference, chapter.UNet)
    for i, (h, w) in enumerate(SIZES):
        x = noise(2, reference.config.in_channels, h, w, dtype=dtype, seed=i)
        text = noise(2, 6 + i, reference.config.cross_attention_dim, dtype=dtype, seed=i)
        for time in (torch.tensor([1000.0, 0.0]), torch.tensor([37.25, 999.0])):
            assert_close(ours(x, time, text), reference(x, time, text).sample)


@torch.no_grad()
def test_unet_in_bfloat16_computes_its_angles_in_float32():
    unet = fill(chapter.UNet((64, 64), 1, (True, False), 2, 12)).bfloat16()
    angle = (1000.0 * 10000.0 ** (-torch.arange(32) / 32.0)).double()
    expected = torch.cat([angle.cos(), angle.sin()])[None]
    seen = []
    unet.time_embedding["linear_1"].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    unet(noise(1, 4, 4, 4).bfloat16(), torch.tensor([1000.0]), noise(1, 5, 12).bfloat16())
    assert seen[0].dtype == torch.bfloat16 and (seen[0].double() - expected).abs().max() < 5e-3


def test_time_embedding_facts():
    """At timestep 1000 and 320 channels the first entry is cos(1000), entry 160 sin(1000)."""
    with torch.device("meta"):
        unet = chapter.UNet()
    unet.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(320, 320), "linear_2": nn.Linear(320, 320)})
    seen = []
    unet.time_embedding["linear_1"].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0]))
    unet.embed(torch.tensor([1000.0]))
    assert seen[0].shape == (320,)
    assert seen[0][0].item() == pytest.approx(0.562379, abs=1e-6)
    assert seen[0][160].item() == pytest.approx(0.826880, abs=1e-6)


def gradients(model, inputs):
    model.zero_grad()
    output = model(*inputs)
    output.square().sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stacked", [False, True])
def test_checkpointing_recomputes_and_changes_nothing(stacked):
    model = fill(chapter.UNet((8, 16), 1, (True, False), 2, 12, groups=4))
    model = chapter.StackedUNet(model) if stacked else model
    inputs = noise(2, 4, 7, 8), torch.tensor([1000.0, 3.0]), noise(2, 5, 12)
    calls, resnet = [], next(m for m in model.modules() if isinstance(m, chapter.ResBlock))
    resnet.register_forward_hook(lambda *_: calls.append(1))
    output, plain = gradients(model, inputs)
    assert len(calls) == 1
    model.checkpointing = True
    again, checkpointed = gradients(model, inputs)
    assert len(calls) == 3 and torch.equal(output, again)
    for name in plain:
        assert plain[name].abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], plain[name], msg=name)
    with torch.no_grad():
        model(*inputs)
    assert len(calls) == 4


@pytest.mark.parametrize("cls, parameters, tensors", [
    ("UNet", 859_520_964, 686), ("VAE", 83_653_863, 248), ("CLIPTextEncoder", 123_060_480, 196),
    ("StackedUNet", 1_719_017_924, 2 * 686 - 6)])
def test_counts_at_full_size(cls, parameters, tensors):
    with torch.device("meta"):
        model = getattr(chapter, cls)()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == len(list(model.parameters())) == tensors


def test_parts_of_the_counts_at_full_size():
    with torch.device("meta"):
        unet, vae = chapter.UNet(), chapter.VAE()
    parts = {"conv_in": 11_840, "time_embedding": 2_050_560, "down_blocks.0": 10_524_480, "down_blocks.1": 36_818_560,
             "down_blocks.2": 139_992_320, "down_blocks.3": 62_277_120, "mid_block": 97_038_080,
             "up_blocks.0": 162_241_280, "up_blocks.1": 258_330_880, "up_blocks.2": 71_413_120,
             "up_blocks.3": 18_810_560, "conv_norm_out": 640, "conv_out": 11_524}
    for name, size in parts.items():
        assert sum(p.numel() for p in unet.get_submodule(name).parameters()) == size, name
    for name, size in {"encoder": 34_163_592, "decoder": 49_490_179, "quant_conv": 72, "post_quant_conv": 20}.items():
        assert sum(p.numel() for p in vae.get_submodule(name).parameters()) == size, name


def test_full_size_names_equal_the_references():
    """The names and shapes of all 686 + 248 + 196 tensors, from the references' configurations of SD 1.5."""
    unet = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8}
    blocks = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
              "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    clip = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    with torch.device("meta"):
        for reference, ours in [(diffusers.UNet2DConditionModel(**unet), chapter.UNet()),
                                (diffusers.AutoencoderKL(**blocks), chapter.VAE()),
                                (transformers.CLIPTextModel(clip), chapter.CLIPTextEncoder())]:
            built = twin_shapes(reference, type(ours))
            assert built == {name: t.shape for name, t in ours.state_dict().items()}


def twin_shapes(reference, cls):
    """Names and shapes of a reference and of ours from its configuration, which must agree."""
    prefix = "text_model." if cls is chapter.CLIPTextEncoder else ""
    theirs = {prefix + name.removeprefix(prefix): t.shape for name, t in reference.state_dict().items()}
    assert {n: t.shape for n, t in chapter.from_config(cls, settings(reference)).state_dict().items()} == theirs
    return theirs


@torch.no_grad()
def test_stacked_unet_chains_two_unets_without_the_seam():
    a, b = (fill(chapter.UNet((8, 16), 1, (True, False), 2, 12, groups=4), seed) for seed in (1, 2))
    x, time, text = noise(2, 4, 8, 8), torch.tensor([1000.0, 20.0]), noise(2, 5, 12)
    seen = {}
    a.conv_norm_out.register_forward_pre_hook(lambda module, inputs: seen.update(features=inputs[0]))
    a(x, time, text)
    b.conv_in.register_forward_hook(lambda module, inputs, output: seen["features"])     # replaces b's first features
    expected = b(x, time, text)
    state = {"a." + n: t for n, t in a.state_dict().items() if not n.startswith(("conv_norm_out", "conv_out"))}
    state |= {"b." + n: t for n, t in b.state_dict().items() if not n.startswith("conv_in")}
    stacked = chapter.StackedUNet(a)
    assert set(stacked.state_dict()) == set(state)
    stacked.load_state_dict(state)
    assert torch.equal(stacked(x, time, text), expected)


def test_stacked_unet_of_one_unet_starts_with_two_copies():
    unet = fill(chapter.UNet((8, 16), 1, (True, False), 2, 12, groups=4))
    stacked = chapter.StackedUNet(unet)
    a, b, c = (network.mid_block.resnets[0].conv1.weight for network in (stacked.a, stacked.b, unet))
    assert torch.equal(a, c) and torch.equal(b, c) and len({t.data_ptr() for t in (a, b, c)}) == 3
    assert hasattr(unet, "conv_out")                       # the network that it was given is whole


# ---- VAE and text encoder --------------------------------------------------------------------------------------------


def reference_vae(channels=(8, 16), layers=1, groups=4, seed=0, **more):
    return fill(diffusers.AutoencoderKL(
        block_out_channels=channels, layers_per_block=layers, norm_num_groups=groups,
        down_block_types=["DownEncoderBlock2D"] * len(channels), up_block_types=["UpDecoderBlock2D"] * len(channels),
        **more), seed)


VAES = {
    "as SD": dict(channels=(8, 16, 24, 24), layers=2),
    "two levels, three latents": dict(channels=(8, 4), layers=1, latent_channels=3, scaling_factor=0.7),
    "one level": dict(channels=(6,), layers=3, groups=2, latent_channels=1),
}


@of_each(VAES)
def test_vae_equals_diffusers(name, dtype):
    reference = reference_vae(**VAES[name]).to(dtype)
    ours = twin(reference, chapter.VAE)
    assert ours.scale == reference.config.scaling_factor
    for i, (h, w) in enumerate([(16, 24), (17, 23), (8, 9)]):
        x = noise(2, 3, h, w, dtype=dtype, seed=i)
        x[1] *= 10
        mean, logvar = ours.encode(x)
        expected = reference.encode(x).latent_dist
        assert_close(mean, expected.mean)
        assert_close(logvar, expected.logvar)
        z = noise(*mean.shape, dtype=dtype, seed=i)
        assert_close(ours.decode(z), reference.decode(z).sample)


@torch.no_grad()
def test_vae_clamps_the_log_variance():
    reference = reference_vae()
    reference.quant_conv.weight *= 1000
    x = noise(1, 3, 8, 8)
    _, logvar = twin(reference, chapter.VAE).encode(x)
    assert logvar.min() == -30 and logvar.max() == 20
    assert torch.equal(logvar, reference.encode(x).latent_dist.logvar)


def test_vae_checkpointing_changes_no_gradient():
    vae, z = fill(chapter.VAE((8, 16), 1, groups=4)), noise(1, 4, 5, 4)
    grads = []
    for vae.checkpointing in (False, True):
        vae.zero_grad()
        vae.decode(z).square().sum().backward()
        grads.append([p.grad.clone() for p in vae.decoder.parameters()])
    torch.testing.assert_close(*grads)


TEXT_ENCODERS = {
    "quick_gelu": dict(vocab_size=99, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3),
    "gelu": dict(vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
                 max_position_embeddings=20, hidden_act="gelu"),
}


def reference_text_encoder(name="gelu", **config):
    config = TEXT_ENCODERS[name] | config
    config |= {"eos_token_id": config["vocab_size"] - 1, "bos_token_id": config["vocab_size"] - 2}
    return fill(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))


@of_each(TEXT_ENCODERS)
def test_text_encoder_equals_transformers(name, dtype):
    reference = reference_text_encoder(name).to(dtype)
    ours = twin(reference, chapter.CLIPTextEncoder)
    for length in (reference.config.max_position_embeddings, 5):
        tokens = (noise(3, length).abs() * 100).long() % reference.config.vocab_size
        assert_close(ours(tokens), reference(tokens).last_hidden_state)


@pytest.mark.parametrize("name", ["ema", "notes", "lists"])
def test_harmless_settings_stop_nothing(tmp_path, name):
    """What diffusers' EMAModel and trainers add, and one number written for every level."""
    reference = reference_unet()
    changes = {"ema": {}, "notes": dict(upcast_attention=True, dropout=0.1, trained_by=["me"], force_upcast=None),
               "lists": dict(attention_head_dim=[2, 2], layers_per_block=[1, 1], cross_attention_dim=[12, 12],
                             transformer_layers_per_block=[1, 1], only_cross_attention=[False, False])}
    if name == "ema":
        from diffusers.training_utils import EMAModel
        average = EMAModel(reference.parameters(), model_cls=type(reference), model_config=reference.config)
        average.save_pretrained(tmp_path)
        changes["ema"] = json.loads((tmp_path / "config.json").read_text())
        assert "optimization_step" in changes["ema"]
    ours = chapter.from_config(chapter.UNet, settings(reference) | changes[name])
    ours.load_state_dict(reference.state_dict())
    x, time, text = noise(2, 4, 8, 8), torch.tensor([1000.0, 3.0]), noise(2, 5, 12)
    with torch.no_grad():
        assert_close(ours(x, time, text), reference(x, time, text).sample)


@pytest.mark.parametrize("cls, build, change, words", [
    ("UNet", reference_unet, {"act_fn": "gelu"}, 'act_fn is "gelu"'),
    ("UNet", reference_unet, {"norm_eps": 1e-6}, "norm_eps"),
    ("UNet", reference_unet, {"flip_sin_to_cos": False}, "flip_sin_to_cos is false"),
    ("UNet", reference_unet, {"freq_shift": 1}, "freq_shift"),
    ("UNet", reference_unet, {"use_linear_projection": True}, "use_linear_projection is true"),
    ("UNet", reference_unet, {"class_embed_type": "timestep"}, 'class_embed_type is "timestep"'),
    ("UNet", reference_unet, {"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block is [1, 2]"),
    ("UNet", reference_unet, {"mid_block_scale_factor": 2}, "mid_block_scale_factor is 2"),
    ("UNet", reference_unet, {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ("UNet", reference_unet, {"addition_embed_type": "text"}, "addition_embed_type"),
    ("VAE", reference_vae, {"shift_factor": 0.1}, "shift_factor is 0.1"),
    ("VAE", reference_vae, {"use_quant_conv": False}, "use_quant_conv is false"),
    ("VAE", reference_vae, {"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "latents_mean is [0.1"),
    ("UNet", reference_unet, {"attention_head_dim": [2, 4]}, "attention_head_dim is [2, 4]"),
    ("UNet", reference_unet, {"attention_head_dim": 3}, "3 heads"),
    ("UNet", reference_unet, {"norm_num_groups": 5}, "UNet"),
    ("UNet", reference_unet, {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, 'is ["AttnDownBlock2D"'),
    ("UNet", reference_unet, {"down_block_types": 3}, "down_block_types is 3"),
    ("UNet", reference_unet, {"block_out_channels": [8, 16, 16]}, "UNet"),
    ("UNet", reference_unet, {"block_out_channels": []}, "UNet"),
    ("UNet", reference_unet, {"block_out_channels": [9, 18], "norm_num_groups": 3, "attention_head_dim": 3}, "9, 18"),
    ("VAE", reference_vae, {"act_fn": "relu"}, "act_fn"),
    ("VAE", reference_vae, {"block_out_channels": 7}, "block_out_channels is 7"),
    ("VAE", reference_vae, {"scaling_factor": "x"}, 'scaling_factor is "x"'),
    ("VAE", reference_vae, {"scaling_factor": 0}, "scale 0"),
    ("CLIPTextEncoder", lambda: reference_text_encoder("gelu"), {"hidden_act": "silu"}, "silu"),
    ("CLIPTextEncoder", lambda: reference_text_encoder("gelu"), {"layer_norm_eps": 1e-3}, "layer_norm_eps"),
    ("CLIPTextEncoder", lambda: reference_text_encoder("gelu"), {"hidden_size": 15}, "15 channels"),
    ("CLIPTextEncoder", lambda: reference_text_encoder("gelu"), {"use_attention_mask": True}, "use_attention_mask"),
])
def test_settings_that_are_not_ours_are_refused(cls, build, change, words):
    config = settings(build())
    chapter.from_config(getattr(chapter, cls), config)
    with pytest.raises(UserError) as error:
        chapter.from_config(getattr(chapter, cls), config | change)
    assert words in one_line(error)


def test_old_configs_without_the_newer_settings_mean_the_defaults():
    """Stable Diffusion 1.4's unet/config.json and vae/config.json as first published, at small widths."""
    unet = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2", "act_fn": "silu",
            "attention_head_dim": 2, "block_out_channels": [8, 16], "center_input_sample": False,
            "cross_attention_dim": 12, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 1,
            "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 4, "out_channels": 4, "sample_size": 64,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    vae = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2", "act_fn": "silu",
           "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "in_channels": 3,
           "latent_channels": 4, "layers_per_block": 1, "out_channels": 3, "sample_size": 512, "norm_num_groups": 4,
           "up_block_types": ["UpDecoderBlock2D"] * 2}
    twin_of = {chapter.UNet: diffusers.UNet2DConditionModel(**{k: v for k, v in unet.items() if k[0] != "_"}),
               chapter.VAE: diffusers.AutoencoderKL(**{k: v for k, v in vae.items() if k[0] != "_"})}
    for cls, reference in twin_of.items():
        ours = chapter.from_config(cls, {chapter.UNet: unet, chapter.VAE: vae}[cls])
        assert {n: t.shape for n, t in ours.state_dict().items()} == {
            n: t.shape for n, t in reference.state_dict().items()}
    assert chapter.from_config(chapter.VAE, vae).scale == 0.18215


# ---- Tokenizer -------------------------------------------------------------------------------------------------------

WORDS = ("photograph astronaut riding horse hyper realistic cute cat don't we'll they're naïve café straße ŵyddfa "
         "Ελλάδα σοφός кошка на лошади 日本語 写真 猫 한국어 사진 ไทย हिन्दी שלום العربية 🐈 🚀 👩‍🚀 👍🏽 🇫🇷 ... --- !? "
         ":-) 100 2026 x² ½ Ⅳ ٣٤").split()
PIECES = WORDS + [
    "'s", "'S", "'t", "'re", "'RE", "'ve", "'m", "'ll", "'d", "'", "''", "'x", "’s", "'sat", "!'s", "x's's", "'l",
    "'r", "0", "42", "3.14", "1,000", "²", "Ⅳ", "½", "٣", "१", "①", "e\u0301", "\u0301", "A\u030a", "q\u0323\u0307",
    "\ufb01", "\u212b", "각", "\u1100\u1161\u11a8", "\u0958", "İ", "ΣΑΣ", "ΟΔΟΣ Σ", "ǅ", "ẞ", "\u212a", "\u2126", "Ꮳ",
    "ᏸ", "𐐀", "𝔘𝔫𝔦", "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|> ", "<|endoftext", "|>", "</w>", "a</w>", "<",
    ">", "#version", " ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x00", "\x01", "\x1b", "\x1c", "\x1d", "\x1e",
    "\x1f", "\x7f", "\x85", "\xa0", "\xad", "\u1680", "\u180e", "\u2003", "\u200b", "\u200c", "\u200d", "\u2028",
    "\u2029", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff", "\ufe0f", "\u20e3", "_", "__a_b", "A.B,C", "C++",
    "@user", "#tag", "(a)", "\\", "\"q\"", "…", "—", "«»", "￼", "\ue000", "\U000f0000", "\U000e0041"]
ASSIGNED = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")]


def random_string(rng):
    """A mixture of the pieces above, random letters and random characters from all of Unicode."""
    def piece():
        kind = rng.random()
        if kind < 0.6:
            return rng.choice(PIECES)
        if kind < 0.8:
            return "".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9)))
        return "".join(rng.choices(ASSIGNED, k=rng.randint(1, 4)))
    return rng.choice(["", " "]).join(piece() for _ in range(rng.randint(0, 40)))


def learn_merges(words, count):
    """Byte-pair encoding by its definition: again and again, join the pair that is most frequent."""
    spell = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str      # bytes as printable letters
    texts = [spell(word.lower())[0][0] for word in words]
    texts = [[*text[:-1], text[-1] + "</w>"] for text in texts]
    merges = []
    for _ in range(count):
        pairs = Counter(pair for text in texts for pair in zip(text, text[1:]))
        if not pairs:
            break
        merges.append(best := max(pairs, key=lambda pair: (pairs[pair], pair)))
        for text in texts:
            i = 0
            while i < len(text) - 1:
                if (text[i], text[i + 1]) == best:
                    text[i:i + 2] = ["".join(best)]
                i += 1
    return merges


@functools.cache
def vocabulary():
    """A vocabulary as the public one is ordered: bytes, bytes that end a word, merges, the two special tokens."""
    rng, alphabet = random.Random(0), sorted(ByteLevel.alphabet())
    assert len(alphabet) == 256
    corpus = WORDS * 3 + ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(600)]
    merges = learn_merges(corpus, 400)
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def write_vocabulary(folder):
    vocab, merges = vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


@pytest.fixture
def tokenizer(tmp_path):
    return chapter.CLIPTokenizer(*write_vocabulary(tmp_path))


def reference_tokens(texts, **options):
    reference = transformers.CLIPTokenizer(vocab=vocabulary()[0], merges=vocabulary()[1])
    return reference(texts, **options)["input_ids"]


def test_tokenizer_equals_transformers_on_2000_strings(tokenizer):
    rng = random.Random(1)
    texts = PIECES + [random_string(rng) for _ in range(2000 - len(PIECES))]
    expected = reference_tokens(texts)
    for text, row in zip(texts, expected):
        assert [tokenizer.start, *tokenizer.encode(text), tokenizer.end] == row, ascii(text)
    expected = reference_tokens(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(tokenizer(texts), expected)
    assert 100 < tokenizer.truncated == sum(len(row) > 77 for row in reference_tokens(texts)) < 1900


def test_tokenizer_knows_every_letter_of_unicode(tokenizer):
    """Every assigned character, twelve to a string, so that category and case of each are right."""
    texts = ["a".join(ASSIGNED[i:i + 12]) for i in range(0, len(ASSIGNED), 12) if not 0x5000 < ord(ASSIGNED[i]) < 0xd000
             and not 0x17200 < ord(ASSIGNED[i]) < 0x1b000 and ord(ASSIGNED[i]) < 0x20000]
    for text, row in zip(texts, reference_tokens(texts)):
        assert [tokenizer.start, *tokenizer.encode(text), tokenizer.end] == row, ascii(text)


def test_tokenizer_pads_with_the_end_and_counts_what_it_cuts(tokenizer):
    rows = tokenizer(["", "cat", "cat " * 75, "cat " * 76])
    (cat,) = tokenizer.encode("cat")
    start, end = tokenizer.start, tokenizer.end
    assert rows.dtype == torch.int64 and rows.tolist() == [
        [start] + [end] * 76, [start, cat] + [end] * 75, [start] + [cat] * 75 + [end], [start] + [cat] * 75 + [end]]
    assert tokenizer.truncated == 1
    assert tokenizer([]).shape == (0, 77) and tokenizer.truncated == 0


def test_tokenizer_of_a_small_vocabulary_has_no_unknown_letters(tmp_path):
    (tmp_path / "v").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b</w>": 3, "ab</w>": 4}))
    (tmp_path / "m").write_text("a b</w>\n")               # without the header line
    tokenizer = chapter.CLIPTokenizer(tmp_path / "v", tmp_path / "m", length=6)
    assert tokenizer(["ab AAB", "c"]).tolist() == [[0, 4, 2, 4, 1, 1], [0, 1, 1, 1, 1, 1]]


def learnt(folder, pad, layout):
    """A tokenizer with words that were learnt, as transformers adds them; in the files of its version 2, 4 or 5."""
    reference = transformers.CLIPTokenizer(*map(str, write_vocabulary(folder)))
    token = functools.partial(AddedToken, normalized=True)
    reference.add_tokens(["<cat-toy>", "Zorgle", "sks", "sks2"])
    if layout == "5":
        raw = AddedToken("Raw", normalized=False)
        reference.add_tokens([token("Word", single_word=True), raw, token("\u00c9T\u00c9")])
    if pad == "new":
        reference.add_special_tokens({"pad_token": "<pad>"})
    elif pad:
        reference.pad_token = pad
    if layout == "5":
        reference.save_pretrained(folder)
        (folder / "vocab.json").unlink(), (folder / "merges.txt").unlink()
        return transformers.CLIPTokenizer.from_pretrained(folder)
    first = len(vocabulary()[0])
    added = {word.content: i for i, word in reference.added_tokens_decoder.items() if i >= first}
    if layout == "4":
        decoder = {str(i): {key: getattr(t, key) for key in ("content", "normalized", "single_word", "special")}
                   for i, t in reference.added_tokens_decoder.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder,
                                                                  "pad_token": reference.pad_token}))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    told = reference.pad_token
    if pad == "new":
        told = {"content": told, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": told}))
    return transformers.CLIPTokenizer.from_pretrained(folder)


LEARNT = ["<cat-toy>", "a <CAT-TOY>s", "zorgle ZorgLe", "asks sks2x sks", "word Word sword words, word.",
          "raw Raw draw Raws", "\u00e9t\u00e9 e\u0301TE\u0301", "hello! wow!!a", "<pad> <PAD>",
          "<|endoftext|>!<|startoftext|>", "sks\n<cat-toy>"]


@pytest.mark.parametrize("layout", ["5", "4", "2"])
@pytest.mark.parametrize("pad", [None, "!", "new"])
def test_learnt_words_and_pad_tokens_equal_transformers(tmp_path, layout, pad):
    reference = learnt(tmp_path, pad, layout)
    ours = chapter.load_tokenizer(tmp_path, chapter.CLIPTextEncoder(len(reference), 8, 1, 2))
    rng = random.Random(2)
    texts = ["", *LEARNT, *(" ".join(rng.sample(LEARNT + PIECES, 5)) for _ in range(200)),
             *("".join(rng.sample(LEARNT, 4)) for _ in range(50))]
    rows = reference(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ours(texts), rows)
    assert set(rows[1].tolist()) & {len(vocabulary()[0])} and (rows[0, -1] != ours.end) == bool(pad)


def test_exports_keep_learnt_words(layout, references, tmp_path):
    """The folder that the chapter writes has the tokenizer's every file, for us and for transformers."""
    shutil.copytree(layout, tmp_path / "model", ignore=lambda folder, names: ["tokenizer"])
    theirs = learnt(tmp_path / "model/tokenizer", "!", "5")
    encoder = copy.deepcopy(references["text_encoder"])
    with pytest.raises(UserError) as error:
        chapter.load_pipeline(tmp_path / "model")
    assert "more words than the text encoder" in one_line(error)
    encoder.resize_token_embeddings(len(theirs))
    encoder.save_pretrained(tmp_path / "model/text_encoder")
    pipe = chapter.load_pipeline(tmp_path / "model")
    chapter.save_pipeline(SimpleNamespace(folder=tmp_path, rank=0), "export", pipe)
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path / "export/tokenizer")
    expected, exported = (tokenizer(LEARNT, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
                          for tokenizer in (theirs, again))
    for tokens in (exported, pipe.tokenizer(LEARNT), chapter.load_pipeline(tmp_path / "export").tokenizer(LEARNT)):
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("vocab, merges", [
    (None, "a b"), ("{", "a b"), ("[1]", "a b"), ('{"a": 1}', "a b"), ("[" * 100000, "a b"), (b"\xff\xfe", "a b"),
    ('{"<|startoftext|>": 0, "<|endoftext|>": "x"}', "a b"),
    ('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": "x"}', "a b"), ('{"<|startoftext|>": 0, "<|endoftext|>": 1}', "a b c"),
    ('{"<|startoftext|>": 0, "<|endoftext|>": 1}', None), ('{"<|startoftext|>": 0, "<|endoftext|>": 1}', b"\xff")])
def test_broken_vocabularies_are_one_line(tmp_path, vocab, merges):
    for name, content in (("v", vocab), ("m", merges)):
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        chapter.CLIPTokenizer(tmp_path / "v", tmp_path / "m")
    one_line(error)


# ---- Files of weights ------------------------------------------------------------------------------------------------

SAFE_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
               torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64,
               torch.float8_e4m3fn, torch.float8_e5m2]


def tensors_of_all_kinds():
    tensors = {str(dtype): (10 * noise(3, 5)).to(dtype) for dtype in SAFE_DTYPES}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "empty half": torch.zeros(3, 0).half(),
                      "umlaut ü, \"quoted\"": torch.arange(3), "odd bytes": torch.arange(3, dtype=torch.uint8)}


def assert_same_tensors(ours, reference):
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert bytes(raw(ours[name])) == bytes(raw(tensor)), name


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "a" * 3: "text"}])
def test_load_safetensors_reads_what_the_package_writes(tmp_path, metadata):
    tensors = tensors_of_all_kinds()
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata)
    before = (tmp_path / "x.safetensors").read_bytes()
    loaded = chapter.load_safetensors(tmp_path / "x.safetensors")
    assert_same_tensors(loaded, tensors)
    for tensor in loaded.values():
        tensor.zero_()                                     # the tensors are the caller's, the file stays
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_save_safetensors_writes_what_the_package_reads(tmp_path):
    tensors = tensors_of_all_kinds() | {"transposed": noise(3, 4).T, "parameter": nn.Parameter(noise(2, 2))}
    chapter.save_safetensors(tmp_path / "new" / "x.safetensors", tensors)
    assert_same_tensors(safetensors.torch.load_file(tmp_path / "new" / "x.safetensors"), tensors)
    assert_same_tensors(chapter.load_safetensors(tmp_path / "new" / "x.safetensors"), tensors)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty file": b"",
    "seven bytes": b"\x01" * 7,
    "header longer than the file": safetensors_bytes({}, length=3),
    "header of 2^63 bytes": safetensors_bytes({}, length=2 ** 63),
    "header of 2^64 - 1 bytes": safetensors_bytes({}, length=2 ** 64 - 1),
    "cut header": safetensors_bytes({"a": entry(0, 4)}, b"1234")[:20],
    "cut data": safetensors_bytes({"a": entry(0, 4)}, b"123"),
    "bytes left over": safetensors_bytes({"a": entry(0, 4)}, b"12345"),
    "no JSON": safetensors_bytes(b"{not json"),
    "no text": safetensors_bytes(b"\xff\xfe\xfd"),
    "deep JSON": safetensors_bytes(b"[" * 100000),
    "a list": safetensors_bytes([1, 2]),
    "a number": safetensors_bytes(7),
    "null": safetensors_bytes(None),
    "entry is a number": safetensors_bytes({"a": 3}),
    "entry is a list": safetensors_bytes({"a": [0, 4]}),
    "no shape": safetensors_bytes({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234"),
    "no offsets": safetensors_bytes({"a": {"dtype": "U8", "shape": [4]}}, b"1234"),
    "unknown dtype": safetensors_bytes({"a": entry(0, 4, "F4")}, b"1234"),
    "dtype is a list": safetensors_bytes({"a": entry(0, 4, ["U8"])}, b"1234"),
    "shape does not fill": safetensors_bytes({"a": entry(0, 4, shape=[3])}, b"1234"),
    "shape overflows": safetensors_bytes({"a": entry(0, 4, shape=[2 ** 62, 4, 2 ** 62])}, b"1234"),
    "zero times huge": safetensors_bytes({"a": entry(0, 0, shape=[0, 2 ** 70])}),
    "negative shape": safetensors_bytes({"a": entry(0, 4, shape=[-2, -2])}, b"1234"),
    "shape of text": safetensors_bytes({"a": entry(0, 4, shape=["4"])}, b"1234"),
    "shape of fractions": safetensors_bytes({"a": entry(0, 4, shape=[4.0])}, b"1234"),
    "shape is a number": safetensors_bytes({"a": entry(0, 4, shape=4)}, b"1234"),
    "offsets out of range": safetensors_bytes({"a": entry(0, 4), "b": entry(4, 12)}, b"12345678"),
    "offsets out of order": safetensors_bytes({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, b"1234"),
    "negative offsets": safetensors_bytes({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, b"1234"),
    "three offsets": safetensors_bytes({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, b"1234"),
    "offsets of text": safetensors_bytes({"a": {"dtype": "U8", "shape": [4], "data_offsets": "04"}}, b"1234"),
    "fractional offsets": safetensors_bytes({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0.0, 4.0]}}, b"1234"),
    "overlap": safetensors_bytes({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"),
    "the same bytes twice": safetensors_bytes({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"),
    "a gap": safetensors_bytes({"a": entry(0, 2), "b": entry(3, 4)}, b"1234"),
    "a gap in front": safetensors_bytes({"a": entry(1, 4)}, b"1234"),
    "the same name twice": safetensors_bytes(b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, '
                                             b'"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}', b"1234"),
    "a long name": safetensors_bytes({"a" * 10 ** 6: entry(1, 4)}, b"1234"),
    "lines in a dtype": safetensors_bytes({"a": entry(0, 4, "U8\nU8")}, b"1234"),
    "the wrong format": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_are_one_line(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(UserError) as error:
        chapter.load_safetensors(path)
    assert len(one_line(error)) < 400 and "x.safetensors" in one_line(error)
    with pytest.raises(Exception):                         # the package refuses them as well
        safetensors.torch.load_file(path)


def test_missing_safetensors_and_folders_are_one_line(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError) as error:
            chapter.load_safetensors(path)
        one_line(error)


def test_misaligned_tensors_are_read(tmp_path):
    """The format allows any order: here float32 begins at an odd byte of the file."""
    data = b"\x07" + struct.pack("<2f", 1.5, -2.0)
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry(0, 1), "b": entry(1, 9, "F32", [2])}, data))
    assert chapter.load_safetensors(path)["b"].tolist() == [1.5, -2.0]


def small_unet(seed=0):
    return fill(chapter.UNet((8, 16), 1, (True, False), 2, 12, groups=4), seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_precision_are_read(tmp_path, dtype):
    """Into the network's own precision; a network without memory takes the file's."""
    path = tmp_path / "x.safetensors"
    state = {name: t.to(dtype) for name, t in small_unet().state_dict().items()}
    safetensors.torch.save_file(state, path)
    with torch.device("meta"):
        meta = chapter.UNet((8, 16), 1, (True, False), 2, 12, groups=4)
    for module in (small_unet(1), meta):
        read = chapter.read_state(module, path)
        assert_same_tensors(read, {name: t.float() for name, t in state.items()})
        module.load_state_dict(read, assign=True)
        assert all(p.requires_grad and p.device.type == "cpu" for p in module.parameters())


def test_weights_that_do_not_fit_are_named(tmp_path):
    unet, path = small_unet(), tmp_path / "x.safetensors"
    before = {name: t.clone() for name, t in unet.state_dict().items()}
    state = dict(before)
    for name in ("conv_in.bias", "conv_in.weight", "conv_out.bias", "mid_block.resnets.0.conv1.bias"):
        del state[name]
    state |= {"extra.weight": torch.zeros(1), "time_embedding.linear_1.bias": torch.zeros(3)}
    safetensors.torch.save_file(state, path)
    with pytest.raises(UserError) as error:
        chapter.read_state(unet, path)
    assert "6 weights" in one_line(error) and "conv_in.bias, conv_in.weight, conv_out.bias" in one_line(error)
    assert_same_tensors(unet.state_dict(), before)
    for name, tensor in (("extra.weight", torch.zeros(1)), ("time_embedding.linear_1.bias", torch.zeros(3))):
        safetensors.torch.save_file(before | {name: tensor}, path)
        with pytest.raises(UserError) as error:
            chapter.read_state(unet, path)
        assert "1 weights" in one_line(error) and name in one_line(error)
        assert_same_tensors(unet.state_dict(), before)
    safetensors.torch.save_file(before | {"conv_in.bias": before["conv_in.bias"].to(torch.int32)}, path)
    with pytest.raises(UserError) as error:
        chapter.read_state(unet, path)
    assert "whole numbers: conv_in.bias" in one_line(error)
    safetensors.torch.save_file({"a\nb": torch.zeros(1), "": torch.zeros(1), "c" * 10 ** 5: torch.zeros(1)}, path)
    with pytest.raises(UserError) as error:
        chapter.read_state(unet, path)
    assert len(one_line(error)) < 1000


def test_text_encoders_with_or_without_prefix_and_positions(tmp_path):
    reference = reference_text_encoder("gelu")
    bare = {name.removeprefix("text_model."): t for name, t in reference.state_dict().items()}
    for i, (prefix, positions) in enumerate(itertools.product(("", "text_model."), (True, False))):
        state = {prefix + name: t for name, t in bare.items()}
        if positions:
            state[prefix + "embeddings.position_ids"] = torch.arange(20)[None]
        safetensors.torch.save_file(state, tmp_path / f"{i}.safetensors")
        ours = chapter.from_config(chapter.CLIPTextEncoder, settings(reference))
        ours.load_state_dict(chapter.read_state(ours, tmp_path / f"{i}.safetensors"))
        assert_same_tensors(ours.state_dict(), {"text_model." + name: t for name, t in bare.items()})


def test_vae_files_from_before_2023_have_other_names(tmp_path):
    reference = reference_vae()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = dict(reference.state_dict())
    for coder, (new, was), end in itertools.product(("encoder", "decoder"), old.items(), ("weight", "bias")):
        state[f"{coder}.mid_block.attentions.0.{was}.{end}"] = state.pop(f"{coder}.mid_block.attentions.0.{new}.{end}")
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    ours = chapter.from_config(chapter.VAE, settings(reference))
    assert_same_tensors(chapter.read_state(ours, tmp_path / "x.safetensors"), reference.state_dict())


# ---- Whole pipelines, from a folder and from a server ----------------------------------------------------------------

FILES = ["tokenizer/vocab.json", "tokenizer/merges.txt", "text_encoder/config.json", "text_encoder/model.safetensors",
         "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
         "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
BIG = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def references():
    vocab = len(vocabulary()[0])
    text_encoder = reference_text_encoder("quick_gelu", vocab_size=vocab, hidden_size=12, max_position_embeddings=77)
    return {"text_encoder": text_encoder, "unet": reference_unet(), "vae": reference_vae()}


@pytest.fixture(scope="module")
def layout(references, tmp_path_factory):
    """A tiny model in the diffusers layout, written by diffusers and transformers themselves."""
    folder = tmp_path_factory.mktemp("layout")
    write_vocabulary(folder / "tokenizer")
    for name, model in references.items():
        model.save_pretrained(folder / name)
    diffusers.PNDMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    assert all((folder / name).is_file() for name in FILES)
    return folder


@pytest.mark.parametrize("network, change", [("unet", {"in_channels": 9}), ("unet", {"out_channels": 8}),
                                             ("vae", {"latent_channels": 3})])
def test_a_model_that_wants_more_than_a_text_is_one_line(layout, tmp_path, network, change):
    """Inpainting, editing and the like: their U-Nets read other channels beside the latents."""
    shutil.copytree(layout, tmp_path / "model")
    {"unet": reference_unet, "vae": reference_vae}[network](**change).save_pretrained(tmp_path / "model" / network)
    with pytest.raises(UserError) as error:
        chapter.load_pipeline(tmp_path / "model")
    assert "channels" in one_line(error)


@pytest.mark.parametrize("places, most", [(20, 20), (120, 120), (120, 77), (20, 10 ** 30)])
def test_texts_are_as_long_as_the_model_reads(layout, tmp_path, places, most):
    """The tokenizer's own limit as in diffusers, which is not always 77; or, if it has none, the text encoder's."""
    shutil.copytree(layout, tmp_path / "model")
    encoder = reference_text_encoder("quick_gelu", vocab_size=len(vocabulary()[0]), hidden_size=12,
                                     max_position_embeddings=places)
    encoder.save_pretrained(tmp_path / "model/text_encoder")
    (tmp_path / "model/tokenizer/tokenizer_config.json").write_text(json.dumps({"model_max_length": most}))
    pipe = chapter.load_pipeline(tmp_path / "model")
    expected = reference_tokens(["cat " * 90, "cat"], padding="max_length", max_length=min(places, most),
                                truncation=True, return_tensors="pt")
    assert torch.equal(pipe.tokenizer(["cat " * 90, "cat"]), expected)
    with torch.no_grad():
        assert_close(pipe.text_encoder(expected), encoder(expected).last_hidden_state)


@torch.no_grad()
def assert_pipeline(pipeline, references):
    """Text, U-Net and decoder of the pipeline in a row give what the references give."""
    tokens = pipeline.tokenizer(["a cute cat, riding", ""])
    text = pipeline.text_encoder(tokens)
    expected = references["text_encoder"](tokens).last_hidden_state
    assert_close(text, expected)
    x, time = noise(2, 4, 4, 4), torch.tensor([1000.0, 1000.0])
    expected = references["unet"](x, time, expected).sample
    assert_close(pipeline.unet(x, time, text), expected)
    assert_close(pipeline.vae.decode(expected / pipeline.vae.scale),
                 references["vae"].decode(expected / 0.18215).sample)
    assert pipeline.configs["scheduler"]["beta_schedule"] == "scaled_linear"


def test_pipeline_from_a_folder(layout, references):
    assert_pipeline(chapter.load_pipeline(layout), references)
    assert_pipeline(chapter.load_pipeline(str(layout)), references)


SCHEDULERS = {
    "v, linear": diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "v, scaled": diffusers.PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
    "sample": diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, prediction_type="sample"),
    "eps, linear": diffusers.DPMSolverMultistepScheduler(),
    "eps, few levels": diffusers.UniPCMultistepScheduler(num_train_timesteps=200, beta_end=0.05),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SCHEDULERS)
def test_pictures_are_those_of_diffusers_whatever_its_scheduler_says(layout, references, tmp_path, name):
    """A network of any prediction, noise by any betas: DPM-Solver's pictures differ by 1 of 255 at most."""
    shutil.copytree(layout, tmp_path / "model")
    SCHEDULERS[name].save_pretrained(tmp_path / "model/scheduler")
    pipe = chapter.load_pipeline(tmp_path / "model")
    chapter.prepare(pipe, torch.device("cpu"), [8, 8])
    prompts = chapter.Prompts(pipe, ["a cute cat", "riding"])
    vae = copy.deepcopy(references["vae"])
    for decoder in (pipe.vae.decoder, vae.decoder):
        decoder.conv_out.weight *= 0.3                     # the picture of random weights would be clipped
    number = torch.arange(6)
    ours = torch.cat([*chapter.pictures(chapter.Sampler(prompts, pipe.unet, "dpm", 6, 3.0), 0, number, number, 4)])

    same = {key: SCHEDULERS[name].config[key] for key in ("num_train_timesteps", "beta_start", "beta_end",
                                                          "beta_schedule", "prediction_type")}
    theirs = diffusers.StableDiffusionPipeline(
        vae, references["text_encoder"], transformers.CLIPTokenizer(*map(str, pipe.tokenizer.files),
                                                                    model_max_length=77),
        references["unet"], diffusers.DPMSolverMultistepScheduler(**same), None, None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(["a cute cat", "riding"] * 3, num_inference_steps=6, guidance_scale=3.0, output_type="pt",
                      height=8, width=8, latents=chapter.pair_noise(0, number, pipe.shape)).images * 2 - 1
    assert (expected.abs() < 1).float().mean() > 0.5 and expected.std() > 0.1
    assert (chapter.to_bytes(ours).int() - chapter.to_bytes(expected).int()).abs().max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_a_prediction_of_any_kind_holds_the_same_noise(kind, betas):
    schedule = chapter.Schedule(0.0001, 0.02, betas, 1000, kind)
    reference = diffusers.DDIMScheduler(beta_schedule=betas)
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    close((schedule.a ** 2).float(), reference.alphas_cumprod)
    x1, x0 = (noise(5, 3, dtype=torch.float64, seed=seed) for seed in (1, 2))
    s = torch.tensor([0, 9, 300, 700, 999])
    a, b = schedule.a[s, None], schedule.b[s, None]
    output = {"epsilon": x0, "v_prediction": a * x0 - b * x1, "sample": x1}[kind]
    close(schedule.noise(output, a * x1 + b * x0, s.double()), x0)


@pytest.mark.parametrize("change, words", [
    ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is squaredcos_cap_v2"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true"), ({"beta_start": "x"}, 'beta_start is "x"'),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas"), ({"beta_end": 2.0}, "2.0"),
    ({"num_train_timesteps": 1.5}, "num_train_timesteps is 1.5"),
    ({"timestep_type": "continuous"}, 'timestep_type is "continuous"'),
    ({"prediction_type": "noise"}, "prediction_type is noise"), ({"sigma_data": 0.5}, "sigma_data")])
def test_another_noise_is_one_line(layout, change, words):
    pipe = chapter.load_pipeline(layout)                   # without its schedule: a velocity can be sampled
    pipe.configs["scheduler"] |= change
    with pytest.raises(UserError) as error:
        pipe.schedule
    assert words in one_line(error)


def test_what_a_scheduler_leaves_out_is_as_in_diffusers(layout):
    pipe = chapter.load_pipeline(layout)
    pipe.configs["scheduler"] = {}
    reference = diffusers.DDIMScheduler()
    assert pipe.schedule.predicts == reference.config.prediction_type == "epsilon"
    torch.testing.assert_close((pipe.schedule.a ** 2).float(), reference.alphas_cumprod, rtol=1e-6, atol=1e-6)


WAYS = {    # how diffusers and transformers write weights
    "shards": dict(max_shard_size="9KB"), "fp16": dict(variant="fp16"),
    "fp16 shards": dict(variant="fp16", max_shard_size="9KB"),
    "not averaged": dict(variant="non_ema"), "bin": dict(safe_serialization=False),
    "bin shards": dict(safe_serialization=False, max_shard_size="9KB"),
    "fp16 bin shards": dict(safe_serialization=False, variant="fp16", max_shard_size="9KB")}


def written(references, layout, folder, way):
    """The model written this way, with its tokenizer as transformers 5 writes it: tokenizer.json alone."""
    for name, model in references.items():
        model.save_pretrained(folder / name, **WAYS[way])
        assert not {"model.safetensors", "diffusion_pytorch_model.safetensors"} & set(os.listdir(folder / name)) \
            or "safe_serialization" in WAYS[way]
    shutil.copytree(layout / "scheduler", folder / "scheduler")
    transformers.CLIPTokenizer.from_pretrained(layout / "tokenizer").save_pretrained(folder / "tokenizer")
    assert not (folder / "tokenizer/vocab.json").exists()
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_pipelines_in_every_layout(references, layout, server, tmp_path, way):
    """From a folder and from a repository; the second time no question is asked."""
    server.folder = folder = written(references, layout, tmp_path / "model", way)
    assert_pipeline(chapter.load_pipeline(folder), references)
    for _ in range(2):
        assert_pipeline(chapter.load_pipeline("owner/name"), references)
        asked, server.log = server.log, []
    assert not asked


@pytest.mark.parametrize("way", ["shards", "fp16", "fp16 shards"])
def test_clip_in_every_layout(server, tmp_path, way):
    """Both towers and the tokenizer, from a folder and from a repository."""
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text = sizes | dict(vocab_size=len(vocabulary()[0]), eos_token_id=len(vocabulary()[0]) - 1)
    vision = sizes | dict(image_size=24, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    reference = fill(transformers.CLIPModel(config))
    server.folder = tmp_path / "clip"
    reference.save_pretrained(server.folder, **WAYS[way])
    write_vocabulary(tmp_path / "words")
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "words").save_pretrained(server.folder)
    for source in (server.folder, "owner/name"):
        ours = chapter.CLIP(source)
        tokens = ours.tokenizer(["a cute cat"])
        expected = F.normalize(reference.get_text_features(tokens).pooler_output, dim=1)
        torch.testing.assert_close(ours.embed_texts(["a cute cat"]), expected, rtol=1e-4, atol=1e-5)


def test_weight_differences_in_every_layout(references, layout, tmp_path):
    """Full precision comes before half; a folder with a shard less names it."""
    folder = written(references, layout, tmp_path / "model", "shards")
    unet = chapter.load_pipeline(layout).unet
    before = {name: t.clone() for name, t in unet.state_dict().items()}
    chapter.merge_delta(unet, *(chapter.fetch_weights(source, chapter.WEIGHTS["unet"]) for source in (layout, folder)))
    assert_same_tensors(unet.state_dict(), before)
    diffusers.UNet2DConditionModel(**dict(references["unet"].config)).save_pretrained(folder / "unet", variant="fp16")
    chapter.merge_delta(unet, *(chapter.fetch_weights(source, chapter.WEIGHTS["unet"]) for source in (layout, folder)))
    assert_same_tensors(unet.state_dict(), before)
    next((folder / "unet").glob("*model-00002-of-*")).unlink()
    with pytest.raises(UserError) as error:
        chapter.fetch_weights(folder, chapter.WEIGHTS["unet"])
    assert "model-00002-of" in one_line(error)


@pytest.mark.parametrize("index, words", [
    ({}, "names no files"), ({"weight_map": [1]}, "names no files"), ({"weight_map": {}}, "names no files"),
    ({"weight_map": {"a": "../../../../stolen"}}, "has no unet/stolen"), ({"weight_map": {"a": 3}}, "has no unet/3")])
def test_hostile_indices_are_one_line_and_lead_nowhere(tmp_path, index, words):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        chapter.fetch_weights(tmp_path, chapter.WEIGHTS["unet"])
    assert words in one_line(error)


@pytest.mark.parametrize("option", ["--model", "--delta", "--clip"])
def test_a_checkpoint_in_one_file_says_what_to_do(layout, tmp_path, monkeypatch, capsys, option):
    (tmp_path / "v1-5.safetensors").write_bytes(safetensors_bytes({}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text("a")
    command = {"--model": ("sample", "--prompt", "a"), "--clip": ("evaluate", "--captions", "c.txt", "--model", layout),
               "--delta": ("sample", "--prompt", "a", "--model", layout)}[option]
    files = ["v1-5.safetensors"] * (2 if option == "--delta" else 1)
    assert call(chapter, *command, option, *files, patch=monkeypatch) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "from_single_file" in err and "v1-5.safetensors is a single file" in err


def older(layout, folder):
    """The same model as repositories had it before safetensors: its weights in files of torch.save."""
    shutil.copytree(layout, folder)
    for path in list(folder.rglob("*.safetensors")):
        name = {"model": "pytorch_model"}.get(path.stem, path.stem)
        torch.save(safetensors.torch.load_file(path), path.with_name(f"{name}.bin"))
        path.unlink()
    return folder


def test_pipeline_with_the_weights_of_torch_save(layout, references, tmp_path):
    assert_pipeline(chapter.load_pipeline(older(layout, tmp_path / "old")), references)


class Hostile:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return open, ("hacked", "w")


@pytest.mark.parametrize("content", [{"weight": Hostile()}, {"weight": "text"}, [1], b"broken"],
                         ids=["hostile", "text", "list", "broken"])
def test_other_files_of_torch_save_are_one_line_and_never_run(layout, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = older(layout, tmp_path / "old") / "unet/diffusion_pytorch_model.bin"
    path.write_bytes(content) if content == b"broken" else torch.save(content, path)
    with pytest.raises(UserError) as error:
        chapter.load_pipeline("old")
    assert path.name in one_line(error) and os.listdir() == ["old"]


@torch.no_grad()
def test_pipeline_with_a_stacked_unet(layout, tmp_path):
    for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
        (tmp_path / name).symlink_to(layout / name)
    config = json.loads((layout / "unet/config.json").read_text())
    stacked = fill(chapter.StackedUNet(chapter.from_config(chapter.UNet, config)))
    chapter.save_safetensors(tmp_path / BIG, stacked.state_dict())
    (tmp_path / "unet/config.json").write_text(json.dumps(config | {"_class_name": "StackedUNet"}))
    loaded = chapter.load_pipeline(tmp_path).unet
    assert_same_tensors(loaded.state_dict(), stacked.state_dict())
    inputs = noise(1, 4, 4, 4), torch.tensor([1000.0]), noise(1, 5, 12)
    assert torch.equal(loaded(*inputs), stacked(*inputs))


@pytest.mark.parametrize("name", FILES)
def test_pipeline_without_a_file_names_it(layout, tmp_path, name):
    for other in FILES:
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).symlink_to(layout / other)
    (tmp_path / name).unlink()
    with pytest.raises(UserError) as error:
        chapter.load_pipeline(tmp_path)
    assert name in one_line(error)
    (tmp_path / name).write_text("[]")
    with pytest.raises(UserError) as error:
        chapter.load_pipeline(tmp_path)
    assert name in one_line(error)


@pytest.mark.parametrize("source", ["no/such/folder", "nothing", "../x", "a/b?c", "", "https://huggingface.co/a/b"])
def test_what_is_neither_folder_nor_repository(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises(UserError) as error:
        chapter.load_pipeline(source if source else "x" * 5)
    assert "neither a folder nor" in one_line(error)


class Server(ThreadingHTTPServer):
    """Serves a folder as a model hub does.  faults: file -> what goes wrong with it; log: what was asked for."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.log = folder, {}, []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        name = self.path.removeprefix("/owner/name/resolve/main/")
        path, fault = self.server.folder / name, self.server.faults.get(name)
        self.server.log.append(name)
        if isinstance(fault, int) or not path.is_file():
            return self.send_error(fault or 404)
        data = path.read_bytes()
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(data) + (fault == "longer")))
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if fault == "cut" else data)
        self.close_connection = True


@pytest.fixture
def server(layout, tmp_path, monkeypatch):
    """A hub with one repository, owner/name, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(layout)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CACHE = Path("runs/cache/owner--name")


OPTIONAL = {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
            "tokenizer/added_tokens.json"}


def files(folder):
    """What was fetched; .no-NAME notes that there is no such file."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("[!.]*") if path.is_file())


def test_pipeline_from_a_repository_is_fetched_once(server, references, layout):
    assert_pipeline(chapter.load_pipeline("owner/name"), references)
    assert sorted(server.log) == sorted([*FILES, *OPTIONAL]) and files(CACHE) == sorted(FILES)
    for name in FILES:
        assert (CACHE / name).read_bytes() == (layout / name).read_bytes()
    asked = len(server.log)
    assert_pipeline(chapter.load_pipeline("owner/name"), references)
    assert len(server.log) == asked                        # the second time from the cache


@pytest.mark.parametrize("fault", ["cut", "longer"])
def test_a_download_that_breaks_off_leaves_no_file_and_starts_over(server, references, layout, fault):
    server.faults[BIG] = fault
    with pytest.raises(UserError) as error:
        chapter.load_pipeline("owner/name")
    size = (layout / BIG).stat().st_size
    assert BIG in one_line(error)
    assert f"{size // 2 if fault == 'cut' else size} of {size + (fault == 'longer')} bytes" in one_line(error)
    assert BIG not in files(CACHE) and not [name for name in files(CACHE) if "part" in name]
    del server.faults[BIG]
    assert_pipeline(chapter.load_pipeline("owner/name"), references)
    assert files(CACHE) == sorted(FILES) and (CACHE / BIG).read_bytes() == (layout / BIG).read_bytes()


def test_reply_without_a_length(server, references):
    server.faults[BIG] = "no length"                       # HTTP/1.0: the end of the connection is the end of the file
    assert_pipeline(chapter.load_pipeline("owner/name"), references)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_of_a_repository_are_named(server, name):
    server.faults[name] = 404
    with pytest.raises(UserError) as error:
        chapter.load_pipeline("owner/name")
    assert f"owner/name/resolve/main/{name}" in one_line(error) and "404" in one_line(error)


@pytest.mark.parametrize("code", [401, 403, 429, 500, 503])
def test_other_refusals_are_one_line(server, code):
    server.faults["vae/config.json"] = code
    with pytest.raises(UserError) as error:
        chapter.load_pipeline("owner/name")
    assert str(code) in one_line(error) and "vae/config.json" in one_line(error)
    assert not (CACHE / "vae/config.json").exists()


@pytest.mark.parametrize("hub", ["http://127.0.0.1:1", "nonsense"])
def test_no_server_is_one_line(server, monkeypatch, hub):
    monkeypatch.setenv("HF_ENDPOINT", hub)
    with pytest.raises(UserError) as error:
        chapter.load_pipeline("owner/name")
    assert hub in one_line(error)


# ---- Half precision and compiled graphs ------------------------------------------------------------------------------


def drawn(layout, dtype, options=None, stacked=False):
    """Twelve pictures in two steps with guidance, as the commands make them.  Returns them and the networks."""
    pipe = chapter.load_pipeline(layout)
    pipe.unet = fill(chapter.StackedUNet(pipe.unet)) if stacked else pipe.unet
    pipe.vae.decoder.conv_out.weight.data *= 0.3           # the picture of random weights would be clipped
    chapter.prepare(pipe, torch.device("cpu"), [8, 8])
    sampler = chapter.Sampler(chapter.Prompts(pipe, ["a cute cat", "riding"], few=0), pipe.unet, "euler", 2, 3.0)
    networks = {"text": chapter.Fast(pipe.text_encoder, "forward", dtype, options),
                "U-Net": chapter.Fast(pipe.unet, "forward", dtype, options),
                "decode": chapter.Fast(pipe.vae, "decode", dtype, options)}
    number = torch.arange(12)
    return torch.cat([*chapter.pictures(sampler, 0, number, number, 4)]), networks


@pytest.mark.parametrize("dtype, levels", [(torch.float16, 1), (torch.bfloat16, 6)])
def test_pictures_in_half_precision_are_those_in_float32(layout, dtype, levels):
    exact, _ = drawn(layout, torch.float32)
    rounded, networks = drawn(layout, dtype)
    assert exact.abs().max() < 1 and exact.std() > 0.1 and rounded.dtype == torch.float32
    for network in networks.values():
        assert network.dtype == dtype and {p.dtype for p in network.module.parameters()} == {dtype}
    apart = (chapter.to_bytes(exact).int() - chapter.to_bytes(rounded).int()).abs()
    assert 0 < (exact - rounded).abs().max() and apart.max() <= levels


@pytest.mark.parametrize("stacked", [False, True])
def test_compiled_networks_draw_the_same_pictures(layout, stacked):
    """Each is one graph, and batches of one size need no second one, whatever the step."""
    torch._dynamo.reset()
    plain, _ = drawn(layout, torch.float32, stacked=stacked)
    graphs = []
    options = dict(backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True, dynamic=False)
    compiled, _ = drawn(layout, torch.float32, options, stacked)
    torch.testing.assert_close(compiled, plain)
    assert len(graphs) == 3
    torch._dynamo.reset()


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_no_batch_compiles_anew(layout, tmp_path, monkeypatch, command):
    """Five pictures, two at a time: the sixth place is filled, and not shown."""
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    pictures, shapes = chapter.pictures, []

    def watched(*arguments):
        drawn = pictures(*arguments)
        shapes.append(next(drawn).shape)
        yield torch.zeros(shapes[0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for images in drawn:
                shapes.append(images.shape)
                yield images
    monkeypatch.setattr(chapter, "pictures", watched)
    options = dict(backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(chapter, "fast_settings", lambda *arguments: (torch.float32, options))
    torch._dynamo.reset()
    more = {"sample": ("--prompt", "a cat", "--count", 5), "evaluate": ("--captions", "captions.txt")}[command]
    code = call(chapter, command, "--model", layout, "--batch", 2, "--size", 8, "--steps", 2, "--guidance", 2, *more,
                patch=monkeypatch)
    assert not code and shapes == [(2, 3, 8, 8)] * 3
    if command == "sample":
        assert Image.open("sample.png").size == (5 * 10, 10)
    else:
        assert json.loads(Path("evaluation.json").read_text())["captions"] == 5
    torch._dynamo.reset()


class Buffer(nn.Module):
    """Writes every output into the same memory, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.output = nn.Buffer(torch.zeros(2, 3, 4))

    def forward(self, x, t):
        self.seen = x.dtype, t.dtype
        return self.output.copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outputs_are_not_overwritten_by_the_next_call(dtype):
    fast = chapter.Fast(Buffer(), "forward", dtype, None)
    first, second = (fast.module(torch.full((2, 3, 4), value), torch.rand(2)) for value in (1.0, 2.0))
    assert fast.module.seen == (dtype, torch.float32)      # float16 has no 999.25
    assert first.unique() == 1 and second.unique() == 2 and first.dtype == torch.float32 and len(fast.seconds) == 2


@torch.no_grad()
def test_a_decoder_that_overflows_goes_back_to_float32():
    vae = fill(chapter.VAE((8, 16), 1, groups=4))
    vae.decoder.conv_in.weight *= 300
    exact, z = copy.deepcopy(vae), noise(2, 4, 5, 4)
    chapter.Fast(vae, "decode", torch.float16, None)
    images = vae.decode(z)
    assert vae.decode.dtype == torch.float16               # a large number that fits is none
    torch.testing.assert_close(images, exact.decode(z), atol=0.02, rtol=0.02)
    for scale in (300, 1, 300):
        torch.testing.assert_close(vae.decode(scale * z), exact.decode(scale * z), atol=0.02, rtol=0.02)
        assert vae.decode.dtype == torch.float32 and {p.dtype for p in vae.parameters()} == {torch.float32}
    assert len(vae.decode.seconds) == 4


def test_only_cuda_is_fast():
    """Half precision always, graphs only for small batches, a search for the best kernels only if compiling pays."""
    benchmark = torch.backends.cudnn.benchmark
    for device, compile, batch, dtype, mode in [
            ("cpu", True, 1, torch.float32, None), ("mps", True, 1, torch.float32, None),
            ("cuda", False, 1, torch.float16, None), ("cuda", True, 1, torch.float16, "reduce-overhead"),
            ("cuda", True, 32, torch.float16, "default")]:
        config = SimpleNamespace(compile=compile, batch=batch)
        got, options = chapter.fast_settings(config, torch.device(device))
        assert got == dtype and (options or {}).get("mode") == mode
        if device == "cuda":
            assert torch.backends.cudnn.benchmark == compile
        assert not options or options["fullgraph"] and options["dynamic"] is False
    torch.backends.cudnn.benchmark = benchmark


def test_seconds_are_of_a_batch_without_the_first(capsys):
    calls = {"text": [9, 1, 2, 3], "U-Net": [8, 1, 1, 2, 2, 3, 3, 4], "decode": [5, 1, 1, 1]}      # two steps a batch
    networks = {name: SimpleNamespace(seconds=seconds) for name, seconds in calls.items()}
    assert chapter.print_seconds(networks, 4) == {"text": 2, "U-Net": 5, "decode": 1}
    out = capsys.readouterr().out
    assert "9.00000 s" in out and "2.00000 s" in out and len(out.splitlines()) == 3
    assert chapter.print_seconds({"text": SimpleNamespace(seconds=[4])}, 1) == {"text": 4}     # there is no other


# ---- LoRA and weight differences -------------------------------------------------------------------------------------

RANK = 3
LAYERS = {  # where a LoRA may sit: Kohya's name, our path
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k":
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0":
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj":
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2":
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "lora_unet_up_blocks_1_attentions_1_proj_in": "up_blocks.1.attentions.1.proj_in",
    "lora_unet_up_blocks_1_resnets_0_conv1": "up_blocks.1.resnets.0.conv1",
    "lora_unet_up_blocks_1_resnets_0_conv_shortcut": "up_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_down_blocks_0_downsamplers_0_conv": "down_blocks.0.downsamplers.0.conv",
    "lora_unet_time_embedding_linear_1": "time_embedding.linear_1",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": "text_model.encoder.layers.0.self_attn.q_proj",
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "text_model.encoder.layers.0.mlp.fc1",
}


def modules(seed=0):
    return {"unet": small_unet(seed), "te": fill(chapter.CLIPTextEncoder(50, 16, 1, 2, 20, 24), seed)}


def layer_of(models, name):
    return models[name.split("_")[1]].get_submodule(LAYERS[name])


def lora(models, names=tuple(LAYERS), flat=False):
    """Random factors for these layers, convolutions as convolutions unless flat."""
    tensors = {}
    for i, name in enumerate(names):
        shape = layer_of(models, name).weight.shape
        ones = () if len(shape) == 2 or flat else (1, 1)
        tensors[f"{name}.lora_down.weight"] = noise(RANK, shape[1], *(shape[2:] if ones else ()), seed=2 * i)
        tensors[f"{name}.lora_up.weight"] = noise(shape[0], RANK, *ones, seed=2 * i + 1)
        tensors[f"{name}.alpha"] = torch.tensor(1.0 + i)
    return tensors


def saved(tensors, path):
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path


def branch(layer, up, down, x):
    """What a LoRA is: two more layers beside the first, of which only the first sees the kernel, stride and padding."""
    if isinstance(layer, nn.Linear):
        return F.linear(F.linear(x, down), up)
    return F.conv2d(F.conv2d(x, down, stride=layer.stride, padding=layer.padding), up)


@torch.no_grad()
def test_lora_is_a_branch_beside_each_layer(tmp_path):
    models, before = modules(), modules()
    tensors = lora(models)
    chapter.merge_lora(models, saved(tensors, tmp_path / "l.safetensors"), 0.7)
    for i, name in enumerate(LAYERS):
        merged, layer = (copy.deepcopy(layer_of(m, name)).double() for m in (models, before))
        shape = (2, layer.weight.shape[1]) + (5, 7) * (layer.weight.dim() == 4)
        x = noise(*shape).double()                         # in float32 some CPUs' convolutions are off by 1e-4
        up, down = (tensors[f"{name}.lora_{side}.weight"].double() for side in ("up", "down"))
        torch.testing.assert_close(merged(x), layer(x) + 0.7 * (1 + i) / RANK * branch(layer, up, down, x),
                                   rtol=1e-5, atol=1e-5)
    changed = {f"{kind}.{name}" for kind in models for name, t in models[kind].state_dict().items()
               if not torch.equal(t, before[kind].state_dict()[name])}
    assert changed == {f"{name.split('_')[1]}.{path}.weight" for name, path in LAYERS.items()}


@torch.no_grad()
def test_lora_identities(tmp_path):
    """up = 0 changes nothing; without alpha the factor is one; a flat factor for a 1x1 convolution is the same; twice
    half is once; minus undoes plus."""
    linear = [name for name in LAYERS if "conv1" not in name and "downsamplers" not in name]
    tensors = lora(modules(), linear)

    def merged(tensors, *scales):
        models = modules()
        for scale in scales:
            chapter.merge_lora(models, saved(tensors, tmp_path / "l.safetensors"), scale)
        return {f"{kind}.{name}": t for kind in models for name, t in models[kind].state_dict().items()}

    plain = merged({})                                     # no file merged at all
    once = merged(tensors, 1.0)
    assert_same_tensors(merged({n: t * ("lora_up" not in n) for n, t in tensors.items()}, 1.0), plain)
    assert_same_tensors(merged(tensors, 0.0), plain)
    assert_same_tensors(merged(lora(modules(), linear, flat=True), 1.0), once)
    torch.testing.assert_close(merged(tensors, 0.5, 0.5), once)
    torch.testing.assert_close(merged(tensors, 1.0, -1.0), plain, rtol=1e-4, atol=1e-5)
    no_alpha = {name: t for name, t in tensors.items() if not name.endswith("alpha")}
    full = {name: torch.tensor(float(RANK)) if name.endswith("alpha") else t for name, t in tensors.items()}
    assert_same_tensors(merged(no_alpha, 1.0), merged(full, 1.0))


# The same LoRA as people have it.  diffusers' and PEFT's names of its layers, and the Kohya names of LAYERS
PLACES = {path: name for name, path in LAYERS.items() if "attn" in path}


def peft_spelling(models, kind, prefix=""):
    """lora_A and lora_B of a network's attention layers, as PEFT names them."""
    tensors = lora(models, [*PLACES.values()])
    return {f"{prefix}{path}.lora_{letter}.weight": tensors[f"{name}.lora_{side}.weight"]
            for path, name in PLACES.items() if name.split("_")[1] == kind
            for letter, side in (("A", "down"), ("B", "up"))}


def diffusers_now(models, folder):
    """What its training scripts save; alpha is 6 for the U-Net, and twice that for one layer."""
    pattern = {"attn2.to_k": 12}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, peft_spelling(models, "unet"), peft_spelling(models, "te"),
        unet_lora_adapter_metadata=dict(r=RANK, lora_alpha=6, alpha_pattern=pattern))
    return folder, {"unet": 6 / RANK, "attn2.to_k": 12 / RANK}


def diffusers_2023(models, folder):
    """lora_linear_layer in the text encoder and .lora.up in the U-Net, without any alpha; the file of torch.save."""
    from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_diffusers
    unet, text = (peft_spelling(models, kind) for kind in ("unet", "te"))
    unet = {name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for name, t in unet.items()}
    text = convert_state_dict_to_diffusers(text, StateDictType.PEFT)
    assert any("q_proj.lora_linear_layer.up" in name for name in text)
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, unet, text, safe_serialization=False)
    return folder / "pytorch_lora_weights.bin", {}


def processors(models, folder):
    """The oldest one: beside a layer's processor, the U-Net's without the prefix, and to_out without its number."""
    state = {}
    for path, t in [*peft_spelling(models, "unet").items(), *peft_spelling(models, "te", "text_encoder.").items()]:
        path = path.replace(".lora_A", "_lora.down").replace(".lora_B", "_lora.up").replace("to_out.0", "to_out")
        path = path.replace("self_attn.q_proj", "self_attn.to_q")
        state[path if "self_attn" in path else path.replace(".to_", ".processor.to_")] = t
    theirs = diffusers.utils.state_dict_utils.convert_unet_state_dict_to_peft(state)
    assert theirs.keys() >= peft_spelling(models, "unet").keys()
    return saved(state, folder / "old.safetensors"), {}


def kohya_of_diffusers(models, folder):
    """Its own converter: lora_te1_..., alpha is the rank; wrapped, as by some trainers."""
    state = peft_spelling(models, "unet", "unet.") | peft_spelling(models, "te", "text_encoder.")
    state = diffusers.utils.convert_state_dict_to_kohya(state)
    assert any(name.startswith("lora_te1_") for name in state) and any(name.endswith("alpha") for name in state)
    state = {name: t * 2 if name.endswith("alpha") else t for name, t in state.items()}
    torch.save({"state_dict": state}, folder / "k.ckpt")
    return folder / "k.ckpt", {"": 2.0}


def adapter(models, folder):
    """PEFT's files of the U-Net's adapter, as PeftModel.save_pretrained names and fills them."""
    saved(peft_spelling(models, "unet", "base_model.model."), folder / "adapter_model.safetensors")
    notes = dict(peft_type="LORA", r=RANK, lora_alpha=6, alpha_pattern={}, use_rslora=True)
    (folder / "adapter_config.json").write_text(json.dumps(notes))
    return folder, {"unet": 6 / RANK ** 0.5, "self_attn": None}


def adapter_file(models, folder):
    return adapter(models, folder)[0] / "adapter_model.safetensors", {"unet": 6 / RANK ** 0.5, "self_attn": None}


@torch.no_grad()
@pytest.mark.parametrize("write", [diffusers_now, diffusers_2023, processors, kohya_of_diffusers, adapter,
                                   adapter_file])
def test_lora_in_every_spelling(tmp_path, write):
    """W + s B A in each of its layers, s = alpha / rank where an alpha is told, else 1; no other weight moves."""
    models, before = modules(), modules()
    path, scales = write(before, tmp_path)
    chapter.merge_lora(models, path, 0.7)
    tensors = lora(before, [*PLACES.values()])
    for dotted, name in PLACES.items():
        scale = [1.0, *(scale for key, scale in scales.items() if key in dotted or key == name.split("_")[1])][-1]
        layer = layer_of(before, name).weight
        if scale:
            up, down = (tensors[f"{name}.lora_{side}.weight"] for side in ("up", "down"))
            layer += 0.7 * scale * up @ down
    for kind in models:
        torch.testing.assert_close(dict(models[kind].state_dict()), dict(before[kind].state_dict()))


@torch.no_grad()
def test_lora_of_peft_itself(tmp_path):
    """An adapter with ranks and alphas of its own for some layers: merged as PEFT merges it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_out.0", "conv1"],
                             rank_pattern={"attn1.to_q": 2}, alpha_pattern={"attn2.to_k": 9, "mid_block.*.to_q": 3})
    theirs, ours = reference_unet(), twin(reference_unet(), chapter.UNet)
    model = peft.get_peft_model(theirs, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.copy_(0.3 * noise(*p.shape, seed=len(name)))
    model.save_pretrained(tmp_path)
    chapter.merge_lora({"unet": ours}, tmp_path)
    torch.testing.assert_close(dict(ours.state_dict()), dict(model.merge_and_unload().state_dict()))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_lora_that_is_no_difference_to_the_model_is_one_line(tmp_path, init):
    """PEFT takes what these begin with out of the weights; W + B A without that is another network."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["attn2.to_k"], init_lora_weights=init)
    peft.get_peft_model(reference_unet(), config).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        chapter.merge_lora(modules(), tmp_path)
    assert "init_lora_weights" in one_line(error)


@pytest.mark.parametrize("notes", [{"alpha_pattern": {"(": 1}}, {"lora_alpha": "x"}, {"alpha_pattern": [1]},
                                   {"lora_alpha": [1]}])
def test_hostile_notes_of_a_lora_are_one_line(tmp_path, notes):
    weights = peft_spelling(modules(), "unet")
    for place in ("adapter_model", "pytorch_lora_weights"):
        (tmp_path / place).mkdir()
        prefixed = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in notes.items()})}
        safetensors.torch.save_file(weights, tmp_path / place / f"{place}.safetensors", prefixed)
    (tmp_path / "adapter_model/adapter_config.json").write_text(json.dumps(notes))
    safetensors.torch.save_file(weights, tmp_path / "other.safetensors", {"lora_adapter_metadata": "[{"})
    for path in tmp_path.iterdir():
        with pytest.raises(UserError) as error:
            chapter.merge_lora(modules(), path)
        assert "does not fit" in one_line(error)


@torch.no_grad()
def test_lora_into_half_precision_rounds_once(tmp_path):
    models = {"unet": small_unet().half()}
    name = "lora_unet_time_embedding_linear_1"
    tensors = lora(models, [name])
    expected = layer_of(models, name).weight.float() + 1 / RANK * (
        tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]).half().float()
    chapter.merge_lora(models, saved({n: t.half() for n, t in tensors.items()}, tmp_path / "l.safetensors"))
    weight = layer_of(models, name).weight
    assert weight.dtype == torch.float16
    torch.testing.assert_close(weight.float(), expected, rtol=2e-3, atol=2e-3)


FIRST = "lora_unet_time_embedding_linear_1"
LAYER = FIRST.removeprefix("lora_unet_")


@pytest.mark.parametrize("change, words", [
    ({f"lora_unet_no_{i}.lora_up.weight": torch.zeros(2, 2) for i in range(5)}, "lora_unet_no_0"),
    ({"lora_unet_no.lora_up.weight": torch.zeros(2, 2), "lora_unet_no.lora_down.weight": torch.zeros(2, 2)},
     "lora_unet_no"),
    ({"unet.conv_in.lora_A.weight": torch.zeros(2, 2)}, "conv_in: up or down is missing"),
    ({f"{FIRST}.lora_mid.weight": torch.zeros(3, 3)}, f"{FIRST}.lora_mid.weight"),
    ({f"{FIRST}.hada_w1_a": torch.zeros(3, 3)}, f"no plain LoRA (but a LoHa, a DoRA, ...?): {FIRST}.hada_w1_a"),
    ({f"{FIRST}.dora_scale": torch.zeros(3)}, f"no plain LoRA (but a LoHa, a DoRA, ...?): {FIRST}.dora_scale"),
    ({"unet.conv_in.lora_magnitude_vector": torch.zeros(3)}, "no plain LoRA (but a LoHa, a DoRA, ...?): unet.conv_in"),
    ({f"{FIRST}.lora_up.weight": None}, f"{LAYER}: up or down is missing"),
    ({f"unet.{LAYER}.lora_B.weight": torch.zeros(32, 3)}, f"unet.{LAYER}.lora_B.weight: no such layer, or a second"),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(2, 2)}, "lora_te2_text_model"),
    ({f"{FIRST}.lora_down.weight": torch.zeros(3, 9)}, LAYER),
    ({f"{FIRST}.lora_down.weight": torch.zeros(4, 8)}, LAYER),
    ({f"{FIRST}.lora_up.weight": torch.zeros(31, 3)}, LAYER),
    ({f"{FIRST}.lora_up.weight": torch.tensor(1.0)}, LAYER),
    ({f"{FIRST}.lora_down.weight": torch.tensor(1.0)}, LAYER),
    ({f"{FIRST}.lora_down.weight": torch.zeros(0, 8), f"{FIRST}.lora_up.weight": torch.zeros(32, 0)}, LAYER),
    ({f"{FIRST}.alpha": torch.zeros(2)}, LAYER),
    ({"lora_te_text_model_encoder_layers_9_mlp_fc1.lora_up.weight": torch.zeros(2, 2)}, "layers_9_mlp_fc1"),
])
def test_wrong_lora_is_one_line(tmp_path, change, words):
    models, tensors = modules(), lora(modules()) | change
    tensors = {name: t for name, t in tensors.items() if t is not None}
    with pytest.raises(UserError) as error:
        chapter.merge_lora(models, saved(tensors, tmp_path / "l.safetensors"))
    assert words in one_line(error)
    with pytest.raises(UserError, match="no LoRA"):
        chapter.merge_lora(models, saved({}, tmp_path / "empty.safetensors"))


@torch.no_grad()
def test_weight_differences(tmp_path):
    """W += scale (W_target - W_base), tensor by tensor; equal files change nothing; there and back restores."""
    plain = dict(small_unet(0).state_dict())
    base, target = ([saved(small_unet(seed).state_dict(), tmp_path / f"{seed}.safetensors")] for seed in (1, 2))
    unet = small_unet(0)
    chapter.merge_delta(unet, base, base)
    assert_same_tensors(unet.state_dict(), plain)
    chapter.merge_delta(unet, base, target, 0.5)
    first, second = small_unet(1).state_dict(), small_unet(2).state_dict()
    expected = {name: t + 0.5 * (second[name] - first[name]) for name, t in plain.items()}
    torch.testing.assert_close(dict(unet.state_dict()), expected)
    chapter.merge_delta(unet, target, base, 0.5)
    torch.testing.assert_close(dict(unet.state_dict()), plain, rtol=1e-5, atol=1e-6)
    unet = small_unet(1)                                   # from the base itself the sum is the target
    chapter.merge_delta(unet, base, target)
    torch.testing.assert_close(dict(unet.state_dict()), dict(second), rtol=1e-5, atol=1e-6)


def test_weight_differences_of_another_network_change_nothing(tmp_path):
    unet, good = small_unet(), saved(small_unet(1).state_dict(), tmp_path / "good.safetensors")
    state = {name: t for name, t in small_unet(2).state_dict().items() if name != "conv_in.weight"}
    bad = saved(state, tmp_path / "bad.safetensors")
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(UserError) as error:
            chapter.merge_delta(unet, *([path] for path in pair))
        assert "bad.safetensors" in one_line(error) and "conv_in.weight" in one_line(error)
    assert_same_tensors(unet.state_dict(), small_unet().state_dict())
