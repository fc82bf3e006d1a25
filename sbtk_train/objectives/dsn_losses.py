"""DSN's loss terms beside classification and the memory bank's; SAKE has the first of them.

As computed by the authors' code (haowang1992/DSN `src/train_cse_resnet_*.py`, `src/tool.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sbtk_train.objectives.losses import contrastive_loss, knowledge_loss


def distillation_loss(
    soft_logits: Tensor, teacher_logits: Tensor, semantic_rows: Tensor, *, kd: float, kdneg: float
) -> Tensor:
    """Returns SAKE's semantic-aware distillation of a batch's photos; sketches have no part in it.

    The mean over photos of the cross-entropy of `softmax(soft_logits)` with the target
    `softmax(kd * teacher_logits + kdneg * semantic_rows)`: WordNet lifts ImageNet classes that
    are near to the photo's own class.

    Args:
        soft_logits: `(P, 1000)`, the student's head for ImageNet classes.
        teacher_logits: `(P, 1000)`, the frozen classifier's for the same pixels; no gradient.
        semantic_rows: `(P, 1000)`, for each photo the semantic matrix's row of its class.
        kd: scales the teacher's logits; 1 in the papers.
        kdneg: scales what WordNet adds to them; 0.3 in the papers.
    """
    target = functional.softmax(kd * teacher_logits + kdneg * semantic_rows, dim=1)
    return knowledge_loss(soft_logits, target)


def two_view_contrastive_loss(
    first: Tensor, second: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Returns the supervised contrastive loss over two views of a batch of both domains.

    Khosla et al. 2020, Eq. 2 ("out"), every view an anchor: positives are the other view of the
    same image and both views of every image of its class, sketch or photo; the mean over positives
    stands outside the logarithm.

    Args:
        first: `(B, D)` unit rows, codes of each image's first view.
        second: `(B, D)` unit rows, codes of the second.
        labels: `(B,) int64`.
        temperature: divides the cosines; 0.07 in DSN.
    """
    return contrastive_loss(torch.cat([first, second]), torch.cat([labels, labels]), temperature)
