"""Base weights of a checkpoint on the host, without a mesh."""

from jaxft.nn import tree
from jaxft.nn.param_spec import is_spec
from jaxft.weights import param_loading, pretrained


def load_on_host(ref, model, store=lambda path, array: array):
    """Load every base parameter as a stacked NumPy array in the files' dtype; the tree gets `store(path,
    array)`.
    """
    leaves = pretrained.open_params(str(ref), model)
    specs = model.specs.get("base", model.specs)
    return tree.map_with_path(
        lambda path, _: store(path, param_loading.read_whole(leaves[path])), specs, is_leaf=is_spec
    )
