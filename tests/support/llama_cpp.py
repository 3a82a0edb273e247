"""llama.cpp itself: ggml's quantisers and the server from the PyPI package xllamacpp, and llama-quantize from
cyllama. Where these are not installed, a test that needs them is skipped (`pip install xllamacpp cyllama`).
"""

import ctypes
import json
import urllib.request

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quant_shape_to_byte_shape

from jaxft.weights.gguf.gguf_quantize import MIXTURES


def package():
    """xllamacpp, or a skip that says how to install it."""
    return pytest.importorskip("xllamacpp", reason="pip install xllamacpp (llama.cpp's server; 100 MB)")


def quantise_file(source, out, mixture: str) -> None:
    """What llama-quantize makes of a GGUF file."""
    reason = "pip install cyllama (llama-quantize; 16 MB)"
    cyllama = pytest.importorskip("cyllama.llama.llama_cpp", reason=reason)
    params = cyllama.LlamaModelQuantizeParams()
    params.ftype, params.nthread = MIXTURES[mixture][0], 1
    cyllama.model_quantize(str(source), str(out), params)


def quantised(kind: Kind, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The bytes [rows, bytes of a row] of ggml_quantize_chunk for float32 weights [rows, columns]."""
    library = ctypes.CDLL(package().xllamacpp.__file__)
    chunk, floats = library.ggml_quantize_chunk, ctypes.POINTER(ctypes.c_float)
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, floats]
    weights = np.ascontiguousarray(weights, np.float32)
    rows, columns = weights.shape
    out = np.zeros(quant_shape_to_byte_shape(weights.shape, kind), np.uint8)
    matrix = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        matrix = importance.ctypes.data_as(floats)
    size = chunk(kind, weights.ctypes.data_as(floats), out.ctypes.data, 0, rows, columns, matrix)
    assert size == out.nbytes
    return out


class _Message(ctypes.Structure):
    _fields_ = [("role", ctypes.c_char_p), ("content", ctypes.c_char_p)]


def chat_text_of(name: str, messages: list[dict[str, str]], generation: bool) -> str:
    """Messages in one of the chat templates that llama.cpp has by name, which it renders without Jinja."""
    apply = ctypes.CDLL(package().xllamacpp.__file__).llama_chat_apply_template
    apply.restype = ctypes.c_int32
    apply.argtypes = [ctypes.c_char_p, ctypes.POINTER(_Message), ctypes.c_size_t, ctypes.c_bool,
                      ctypes.c_char_p, ctypes.c_int32]  # fmt: skip
    turns = [_Message(m["role"].encode(), m["content"].encode()) for m in messages]
    text = ctypes.create_string_buffer(4096)
    size = apply(name.encode(), (_Message * len(turns))(*turns), len(turns), generation, text, len(text))
    assert 0 <= size <= len(text), f"llama.cpp has no template {name}"
    return text.raw[:size].decode()


class Runtime:
    """llama.cpp's server for a GGUF file, in one thread and float32, with adapters alone in GGUF files."""

    def __init__(self, path, adapters=()):
        xllamacpp = package()
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), 256, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.n_gpu_layers, params.use_jinja = False, 0, True
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0) for adapter in adapters]
        self.server = xllamacpp.Server(params)

    def token_ids(self, text: str) -> list[int]:
        return self._post("tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def chat_text(self, messages: list[dict[str, str]]) -> str:
        """The messages in the file's chat template, with the start of a response."""
        return self._post("apply-template", messages=messages)["prompt"]

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """At most `new` greedy tokens after `ids`."""
        return self._complete(ids, new, return_tokens=True)["tokens"]

    def log_probs(self, ids: list[int], count: int) -> dict[int, float]:
        """The log-probabilities of the `count` most likely tokens after `ids`.

        They are those of the logits before a bias, which makes the completion a letter: the server leaves
        them out where the completion ends within a character.
        """
        letter = self.token_ids("a")[-1]
        reply = self._complete(ids, 1, n_probs=count, logit_bias=[[letter, 1000.0]])
        return {top["id"]: top["logprob"] for top in reply["completion_probabilities"][0]["top_logprobs"]}

    def _complete(self, ids, new, **settings):
        greedy = dict(n_predict=new, temperature=0.0, cache_prompt=False)
        return self._post("completion", prompt=ids, **greedy, **settings)

    def _post(self, name, **body):
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}/{name}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)
