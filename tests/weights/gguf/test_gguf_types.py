"""Tensor types of GGUF files as llama-quantize writes them, against the gguf package and transformers."""

import gguf as gguf_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import blocks_of, gguf_tensors, write_gguf
from host_weights import load_on_host
from loading_process import one_device
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits

from jaxft.distributed import sharding
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import QTensor, Quant, dequantize
from jaxft.train import trainable_params
from jaxft.weights import pretrained
from jaxft.weights.gguf.gguf_architectures import ARCHITECTURES, hf_name
from jaxft.weights.quantised.quantised_checkpoints import dequantised_part
from jaxft.weights.tensors import full_index

torch = pytest.importorskip("torch")
PACKED = {  # the kind of QTensor with the same values, its block and its bits per parameter
    Kind.Q8_0: ("int8", 32, 8.5), Kind.Q4_0: ("int4", 32, 4.5), Kind.Q4_1: ("affine4", 32, 5),
    Kind.Q5_0: ("int8", 32, 8.5), Kind.Q2_K: ("affine4", 16, 8), Kind.Q3_K: ("int4", 16, 6),
    Kind.Q4_K: ("affine4", 32, 6), Kind.Q6_K: ("int8", 16, 10),
}  # fmt: skip
EXPANDED = (Kind.Q5_1, Kind.Q5_K, Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ3_S, Kind.IQ2_XXS, Kind.TQ2_0)


def wide(**changes):
    """A tiny model whose rows are whole blocks of 256."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=64)
    return tiny_torch(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})


def values_by_gguf(reference, kind):
    """The values of the file's matrices by Hugging Face name; not q and k, whose rows have another order."""
    out = {}
    for i, (name, value) in enumerate(gguf_tensors(reference)):
        stored = kind(name) if callable(kind) else kind
        if value.ndim == 2 and "attn_q" not in name and "attn_k" not in name:
            raw = blocks_of(value, stored, i)
            out[hf_name(ARCHITECTURES["llama"], name)] = gguf_package.quants.dequantize(raw, stored)
    return out


def kept(path):
    """(the base stored as the file stores it, the lines about what is stored otherwise)."""
    model = pretrained.model_for(str(path), dtype=jnp.float32)
    stored = trainable_params.partition_params(
        model, Adapter(rank=2), None, Quant("checkpoint"), str(path)
    ).stored
    base = pretrained.load_base(str(path), stored, one_device())
    return model, base, pretrained.storage_changes(str(path), stored)


@pytest.mark.parametrize("kind", [*PACKED, *EXPANDED], ids=lambda kind: kind.name)
def test_every_type_has_the_values_that_the_gguf_package_gives_it(tmp_path, kind):
    reference = wide(num_hidden_layers=1, tie_word_embeddings=False)
    path = write_gguf(tmp_path / "tiny.gguf", reference, kind)
    files = pretrained.open_files(str(path))
    expected = values_by_gguf(reference, kind)
    assert len(expected) == 7
    for name, value in expected.items():
        np.testing.assert_array_equal(files.read(name), value, err_msg=name)
        rows, columns = slice(5, 40), slice(100, 300)
        part = files.read(name, (rows, columns))
        np.testing.assert_array_equal(part, value[rows, columns], err_msg=name)
    down = "model.layers.0.mlp.down_proj.weight"
    for name, tensor in files.quantised.items():
        assert (tensor.layout is not None) == (kind in PACKED)
        np.testing.assert_array_equal(dequantised_part(tensor), files.read(name), err_msg=name)
        index = (slice(8, 72), slice(96, 224))
        np.testing.assert_array_equal(dequantised_part(tensor, index), files.read(name)[index], err_msg=name)
    if kind in PACKED:
        q = files.quantised[down].read(full_index((slice(64, 320),), (512, 256)))
        held, block, _ = PACKED[kind]
        assert isinstance(q, QTensor) and (q.kind, q.block) == (held, block)
        np.testing.assert_array_equal(np.asarray(dequantize(q)).T, expected[down][:, 64:320])


@pytest.mark.quick_cases("Q4_K")
@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.Q3_K], ids=lambda kind: kind.name)
def test_k_quants_stay_packed_on_one_device_and_on_a_mesh(tmp_path, kind):
    path = write_gguf(tmp_path / "tiny.gguf", wide(), kind)
    model, base, changes = kept(path)
    held, block, bits = PACKED[kind]
    plain = load_on_host(str(path), model, lambda path, x: jnp.asarray(x))
    for group, name in (("attn", "q"), ("attn", "k"), ("mlp", "down")):
        q = base["layers"][group][name]
        assert (q.kind, q.block) == (held, block)
        assert sum(8 * x.nbytes for x in jax.tree.leaves(q)) == bits * q.shape[0] * q.shape[1] * q.shape[2]
        np.testing.assert_array_equal(dequantize(q), plain["layers"][group][name])
    assert any("each code of" in line for line in changes) == (kind != Kind.Q4_K)
    tokens = some_tokens(8, vocab=64)
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))
    stored = trainable_params.partition_params(
        model, Adapter(rank=2), None, Quant("checkpoint"), str(path)
    ).stored
    with jax.set_mesh(mesh):
        many = pretrained.load_base(str(path), stored, mesh)
        for array in ("codes", "scale"):
            parts = (getattr(tree["layers"]["mlp"]["up"], array) for tree in (many, base))
            np.testing.assert_array_equal(*map(np.asarray, parts))
    np.testing.assert_allclose(our_logits(model, base, tokens), our_logits(model, plain, tokens), atol=1e-4)


def q4_0_file(name):
    """Q4_0 with an importance matrix, tied head: the table in Q6_K, the first layers of ffn_down in Q4_1."""
    return {"token_embd.weight": Kind.Q6_K, "blk.0.ffn_down.weight": Kind.Q4_1}.get(name, Kind.Q4_0)


def q4_1_file(name):
    """Q4_1 with a head of its own, in Q6_K."""
    return Kind.Q6_K if name == "output.weight" else Kind.Q4_1


def q4_k_m_file(name):
    """Q4_K_M: half of the layers have attn_v and ffn_down in Q6_K, the others in Q4_K; a head in Q6_K."""
    more = name in ("blk.0.attn_v.weight", "blk.0.ffn_down.weight", "output.weight")
    return Kind.Q6_K if more else Kind.Q4_K


def q5_k_s_file(name):
    """Q5_K_S, whose codes no QTensor has; attn_q in Q8_0, so that something can stay packed."""
    return Kind.Q8_0 if "attn_q" in name else Kind.Q5_K


FILES = {  # file -> whether the head is tied, kinds of attn/q, attn/v, mlp/down as they are stored
    q4_0_file: (True, ("int4", "int4", "affine4")),
    q4_1_file: (False, ("affine4", "affine4", "affine4")),
    q4_k_m_file: (False, ("affine4", None, None)),
    q5_k_s_file: (False, ("int8", None, None)),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)
def test_files_of_llama_quantize_are_read_and_stay_packed_where_they_can(tmp_path, file):
    from transformers import AutoModelForCausalLM

    tied, kinds = FILES[file]
    fields = [("add_vocab_size", 64)]  # without a tokenizer, transformers needs it
    path = write_gguf(tmp_path / "tiny.gguf", wide(tie_word_embeddings=tied), file, fields=fields)
    model, base, changes = kept(path)
    layers = base["layers"]
    for x, kind in zip((layers["attn"]["q"], layers["attn"]["v"], layers["mlp"]["down"]), kinds, strict=True):
        assert (x.kind if isinstance(x, QTensor) else None) == kind
    assert any("layers/mlp/down" in line for line in changes) == (kinds[2] is None)
    assert any("GGUF Q6_K" in line or "GGUF Q5_K" in line for line in changes)  # the table and the head
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    assert theirs.config.tie_word_embeddings == tied == model.config.tied
    tokens = some_tokens(vocab=64)
    np.testing.assert_allclose(our_logits(model, base, tokens), torch_logits(theirs, tokens), atol=2e-4)


def test_a_type_that_the_gguf_package_cannot_dequantise_is_one_line(tmp_path):
    extra = [("blk.0.attn_rot_embd.weight", np.zeros((2, 4), np.int32))]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_torch(), extra=extra)
    with pytest.raises(ValueError, match=r"tiny.gguf: tensor blk.0.attn_rot_embd.weight has type I32, which"):
        pretrained.open_files(str(path))


def test_a_scale_of_q4_0_that_is_no_offset_is_one_line(tmp_path):
    reference = wide()
    path = write_gguf(tmp_path / "tiny.gguf", reference, q4_0_file)
    tensor = pretrained.open_files(str(path)).quantised["model.layers.1.mlp.down_proj.weight"]
    down = reference.model.layers[1].mlp.down_proj.weight.detach().numpy()
    raw = bytearray(path.read_bytes())
    first = raw.find(blocks_of(down, Kind.Q4_0).tobytes())
    raw[first : first + 2] = np.float16(9000).tobytes()
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="a scale of its Q4_0 blocks is not finite or too large"):
        tensor.read()
    with pytest.raises(ValueError, match=r"tiny.gguf: model.layers.1.mlp.down_proj.weight: a scale"):
        kept(path)
