"""Sub-networks: what a choice of the elastic axes means for one model, its name and its cost.

Standard library only. `axes` is the table of the axes. `ModelShape` says what a model has; `Subnet`
is one choice resolved against it, layer by layer. `resolve` builds one from values, `parse_name`
from a name.
"""

from elastic_moe.routing.axes import LayerSubnet
from elastic_moe.routing.checks import as_float32, shorten, spell_float32
from elastic_moe.routing.names import is_name, read_name
from elastic_moe.routing.resolution import parse_name, resolve
from elastic_moe.routing.shape import ModelShape
from elastic_moe.routing.subnet import Subnet

__all__ = [
    "LayerSubnet",
    "ModelShape",
    "Subnet",
    "as_float32",
    "is_name",
    "parse_name",
    "read_name",
    "resolve",
    "shorten",
    "spell_float32",
]
