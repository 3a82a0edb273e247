"""Tiny models in quantised folders: by bitsandbytes itself, and GPTQ and AWQ by their definitions."""

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import edit_config, tiny_torch, write_folder

LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
)  # fmt: skip
SIZES = dict(hidden_size=64, intermediate_size=192)


def is_linear(name):
    return name.endswith(".weight") and name.split(".")[-2] in LINEAR


def by_bitsandbytes(folder, kind, double, make=tiny_torch, exact=False, **changes):
    """(folder, dequantised weights by name) of a tiny model that transformers quantised. make: returns the
    model. exact: dequantised in float32, not rounded to bfloat16.
    """
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = write_folder(folder / "plain", make(**{**SIZES, **changes}).to(torch.bfloat16))
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(
        str(plain), quantization_config=how, dtype=torch.bfloat16, device_map="cpu"
    )
    write_folder(folder / "packed", model)
    expected = {}
    for name, module in model.named_modules():
        if name.split(".")[-1] in LINEAR:
            state, shape = module.weight.quant_state, module.weight.quant_state.shape
            state.dtype = torch.float32 if exact else state.dtype
            state.shape = torch.Size(
                (1, shape.numel())
            )  # on a CPU it takes rows of less than whole blocks for whole ones
            expected[f"{name}.weight"] = (
                dequantize_4bit(module.weight.data, state).float().numpy().reshape(shape)
            )
            state.shape = shape
    return folder / "packed", expected


def pack_int32(codes, axis, order=range(8)):
    """Eight 4-bit numbers an int32, in torch: those at order[i] of each eight are the i-th lowest bits."""
    codes = torch.movedim(torch.as_tensor(codes, dtype=torch.int64), axis, -1)
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    words = sum(eights[..., at] << (4 * i) for i, at in enumerate(order))
    return torch.movedim(
        torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), -1, axis
    ).contiguous()


def write_grouped(
    folder, method, group=32, sym=False, ordered=False, less=1, changes=SIZES, make=tiny_torch, **settings
):
    """(folder, torch model with the same numbers) of random GPTQ or AWQ weights. make: returns the model."""
    reference = make(**changes)
    write_folder(folder, reference)
    state, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name in [n for n in state if is_linear(n)]:
        outs, ins = state.pop(name).shape
        size, stem = group if group > 0 else ins, name.removesuffix(".weight")
        codes = rng.integers(0, 16, (ins, outs))
        zeros = np.full((-(-ins // size), outs), 8) if sym else rng.integers(1, 16, (-(-ins // size), outs))
        scales = rng.uniform(0.01, 0.05, zeros.shape).astype(np.float16)
        index = np.arange(ins) // size
        index = rng.permutation(index) if ordered else index
        exact = (codes - zeros[index]) * scales[index].astype(np.float64)
        with torch.no_grad():
            reference.get_parameter(name).copy_(torch.tensor(exact.T))
        state[f"{stem}.scales"] = torch.tensor(scales)
        if method == "awq":
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            state |= {
                f"{stem}.qweight": pack_int32(codes, 1, order),
                f"{stem}.qzeros": pack_int32(zeros, 1, order),
            }
        else:
            state |= {f"{stem}.qweight": pack_int32(codes, 0), f"{stem}.qzeros": pack_int32(zeros - less, 1)}
            state |= {
                f"{stem}.g_idx": torch.tensor(index, dtype=torch.int32),
                f"{stem}.bias": state.get(f"{stem}.bias", torch.zeros(outs)),
            }
    save_file(state, folder / "model.safetensors")
    known = {"quant_method": method, "bits": 4, "group_size": group, **settings}
    edit_config(
        folder, quantization_config=known | ({"sym": sym, "desc_act": ordered} if method == "gptq" else {})
    )
    return folder, reference


def by_llm_int8(folder, make=tiny_torch):
    """(folder, torch model with the same numbers) of weights in bitsandbytes' 8-bit layout. make: returns the
    model.
    """
    reference = make(**SIZES)
    write_folder(folder, reference)
    state = load_file(folder / "model.safetensors")
    for name in [n for n in state if is_linear(n)]:
        scb = state[name].abs().amax(1)
        codes = torch.round(state[name] * (127 / scb[:, None])).to(torch.int8)
        state |= {
            name: codes,
            name.replace("weight", "SCB"): scb,
            f"{name}_format": torch.zeros((), dtype=torch.uint8),
        }
        with torch.no_grad():
            reference.get_parameter(name).copy_(codes.float() * (scb * np.float32(1 / 127))[:, None])
    save_file(state, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    return folder, reference
