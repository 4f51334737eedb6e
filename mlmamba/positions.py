"""What the values of a training batch decide, found and checked on the CPU before the batch goes to a device.

A forward pass that has to know where the labels and the placeholders of images are, and whether ids are within the
vocabulary, would have to wait for the device and read them back. Whoever makes the batch finds them beside it, and the
model takes them as tensors. Shapes: b batch, l length, n images, N tokens per image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlmamba.checks import check_ids, check_places
from mlmamba.conversation import IGNORE_INDEX


@dataclass(frozen=True)
class Positions:
    """Positions count through the batch, row after row: that of token t of row i is i l + t."""

    images: Tensor
    """(k,) int64, the placeholders of images."""
    labelled: Tensor
    """(m,) int64, the positions whose next token has a label and is of the same sequence."""
    targets: Tensor
    """(m,) int64, those labels."""
    weights: Tensor | None = None
    """(m,) float32, how much each counts in the loss; None: all the same."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "Positions":
        """On another device, as `Tensor.to`."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Positions":
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Positions":
        weights = None if self.weights is None else function(self.weights)
        return Positions(function(self.images), function(self.labelled), function(self.targets), weights)


def find_positions(
    input_ids: Tensor, labels: Tensor, seq_idx: Tensor | None, images: Sequence[int], config
) -> Positions:
    """Find the positions of a batch on the CPU.

    Args:
        input_ids, labels, seq_idx: (b, l), as `MLMambaForConditionalGeneration.forward` takes them.
        images: tokens of each image, in reading order.
        config: MLMambaConfig.

    Raises:
        ValueError: an id is outside the vocabulary, the placeholders and the images do not match, or an image would be
            split over two rows.
    """
    check_ids(input_ids, config.text_config.vocab_size)
    places = input_ids == config.image_token_id
    shape = (sum(images),) if len(set(images)) > 1 else (len(images), images[0]) if images else None
    check_places(places.sum(1).tolist(), shape, images if len(set(images)) > 1 else ())
    keep = label_mask(labels, seq_idx)
    rows, columns = keep.nonzero(as_tuple=True)
    labelled = rows * labels.shape[1] + columns
    return Positions(places.flatten().nonzero()[:, 0], labelled, labels[:, 1:][keep])


def label_mask(labels: Tensor, seq_idx: Tensor | None) -> Tensor:
    """(b, l - 1) bool: where the next token has a label. One at the start of a sequence has no token before it that
    could predict it."""
    keep = labels[:, 1:] != IGNORE_INDEX
    return keep if seq_idx is None else keep & (seq_idx[:, 1:] == seq_idx[:, :-1])
