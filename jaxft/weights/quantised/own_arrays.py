"""jaxft's own format: the arrays of a QTensor as NAME.codes, NAME.scale and so on."""

from operator import attrgetter
from typing import Any

from jaxft.nn.quant import FORMATS, KINDS, QTensor, Quant, is_paired
from jaxft.weights.hf.safetensors import SafetensorsFiles, read_tensor
from jaxft.weights.model_files import Index, QuantisedTensor
from jaxft.weights.quantised import file_format as ff


def _open(files: SafetensorsFiles, settings: ff.QuantConfig) -> ff.Weights:
    try:
        quant = Quant(settings["kind"], settings["block"], settings["double"])
    except (KeyError, ValueError, TypeError) as e:
        raise ValueError(f"{files.where}: its quantization_config is not a format of jaxft ({e})") from e

    def weight(name: str) -> QuantisedTensor:
        rows, outs = ff.matrix_shape(files, f"{name}.codes", FORMATS[quant.kind].code_dtype)
        layout = ff.quantize_layout((rows * (2 if is_paired(quant.kind) else 1), outs), quant)
        arrays = ff.arrays_of(layout)

        def decode(index: Index) -> dict[str, Any]:
            return {
                array: read_tensor(files, f"{name}.{array}", ff.array_index(layout, array, index), x.shape)
                for array, x in arrays.items()
            }

        return ff.quantised_tensor("jaxft", [f"{name}.{array}" for array in arrays], layout, decode)

    return {name: weight(name) for name in ff.stems(files, ".codes")}


def _write(name: str, layout: QTensor) -> list[ff.WrittenTensor]:
    arrays = ff.arrays_of(layout).items()
    return [ff.WrittenTensor(f"{name}.{array}", x.dtype, x.shape, attrgetter(array)) for array, x in arrays]


OWN_ARRAYS = ff.FileFormat(
    "jaxft",
    _open,
    kinds=KINDS,
    summary="jaxft's own layout (quant=checkpoint reads it; transformers and vLLM do not)",
    write=_write,
    config=lambda quant, plain, packed: {"kind": quant.kind, "block": quant.block, "double": quant.double},
    whole_blocks=False,
)
