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


def write_fp8(folder, block=(32, 32), make=tiny_torch, **settings):
    """(folder, dequantised weights by name) of a tiny model in the layout of transformers' FineGrainedFP8.

    block: outputs and inputs that share a scale.
    """
    write_folder(folder, make(**SIZES))
    state, expected = load_file(folder / "model.safetensors"), {}
    for name in [n for n in state if is_linear(n)]:
        rows, columns = (torch.arange(n) // b for n, b in zip(state[name].shape, block, strict=True))
        grid = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
        for i, j in np.ndindex(*grid.shape):
            grid[i, j] = state[name][rows == i][:, columns == j].abs().max() / 448
        scale = grid[rows][:, columns]
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = grid
        expected[name] = (state[name].float() * scale).numpy()
    save_file(state, folder / "model.safetensors")
    known = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    edit_config(folder, quantization_config=known | settings)
    return folder, expected


COMPRESSED = {  # format, bits, shape of a weight [out, in] to shape of its scales
    "tensor": ("float-quantized", 8, lambda outs, ins: (1,)),
    "channel": ("float-quantized", 8, lambda outs, ins: (outs, 1)),
    "group": ("float-quantized", 8, lambda outs, ins: (outs, ins // 32)),
    "block": ("float-quantized", 8, lambda outs, ins: (outs // 16, ins // 32)),
    "int8": ("int-quantized", 8, lambda outs, ins: (outs, 1)),
    "int4": ("pack-quantized", 4, lambda outs, ins: (outs, ins // 32)),
}


def write_compressed(folder, case, make=tiny_torch, weights=(), **settings):
    """(folder, dequantised weights by name) of random weights in compressed-tensors' layouts.

    case: of COMPRESSED. weights, settings: changes of the settings of the weights and of the others.
    """
    write_folder(folder, make(**SIZES))
    state, expected, rng = load_file(folder / "model.safetensors"), {}, np.random.default_rng(0)
    format, bits, grid = COMPRESSED[case]
    for name in [n for n in state if is_linear(n)]:
        outs, ins = state[name].shape
        scale = torch.tensor(rng.uniform(0.01, 0.05, grid(outs, ins))).to(torch.bfloat16)
        if format == "float-quantized":
            numbers = torch.tensor(rng.normal(size=(outs, ins))).to(torch.float8_e4m3fn)
            state[name] = numbers
        else:
            numbers = torch.tensor(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (outs, ins)))
            state[name] = numbers.to(torch.int8)
        if format == "pack-quantized":
            del state[name]
            state[f"{name}_packed"] = pack_int32(numbers + 8, 1)
            state[f"{name}_shape"] = torch.tensor([outs, ins])
        state[f"{name}_scale"] = scale
        wide = scale.float().reshape(scale.shape if scale.ndim == 2 else (1, 1)).numpy()
        wide = np.repeat(np.repeat(wide, outs // wide.shape[0], 0), ins // wide.shape[1], 1)
        expected[name] = numbers.float().numpy() * wide
    save_file(state, folder / "model.safetensors")
    group = {
        "num_bits": bits, "type": "float" if format == "float-quantized" else "int", "symmetric": True,
        "strategy": {"int8": "channel", "int4": "group"}.get(case, case), "dynamic": False,
        "group_size": 32 if case in ("group", "int4") else None,
        "block_structure": [16, 32] if case == "block" else None, "observer": "minmax",
    }  # fmt: skip
    token = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    scheme = {"targets": ["Linear"], "weights": group | dict(weights), "input_activations": token}
    known = {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip
    edit_config(folder, quantization_config=known | settings)
    return folder, expected


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
