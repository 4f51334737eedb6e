"""Finding what makes the host wait for a device: operators whose result the host must see before it can go on.

`no_host_reads` finds them on a CPU with real values. With tensors of a faked device (torch's FakeTensorMode) reading a
value fails by itself, and a copy to the host is found by `no_host_reads` here as well.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select")
READS += ("unique_consecutive", "_unique", "_unique2", "unique_dim", "bincount", "_nested_tensor_size")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class HostRead(AssertionError):
    """An operator that the host waits for."""


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in READS:
            raise HostRead(f"{function}: its result is read on the host, or has a shape that values decide")
        if name in INDEXED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            raise HostRead(f"{function} with a mask: its shape is decided by values")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise HostRead(f"{function} without output_size: its shape is decided by values")
        out = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_", "_copy_from"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
            if source.device.type not in ("cpu", "meta") and target.device.type == "cpu":
                raise HostRead(f"{function} from {source.device} to the host")
        return out


@contextmanager
def no_host_reads():
    """Raises HostRead inside the block where an operator makes the host wait for the device."""
    with _NoHostReads():
        yield
