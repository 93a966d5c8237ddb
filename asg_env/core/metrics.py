"""Figures about one network on one split: confusion, calibration, spread of its features."""

import torch
from torch import Tensor

NORM_OFFSET = 1e-4  # added to the squared length of a feature vector
# Least squared distance of two directions. Float64 gives 2 - 2 cos to about 1e-15, so that what is
# below is rounding; a pair of identical vectors counts as 27.6, 1e6 and 1e12 for s = 0, 1 and 2.
LEAST_SQUARED_DISTANCE = 1e-12


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count the images of each class by the class that was predicted for them.

    Images without a prediction, -1, are counted nowhere: the sum of a row may fall short of the
    images of its class.

    Args:
        predicted: Class per image or -1, int64, shape (N,).
        labels: True class per image, int64, shape (N,), on any device.
        classes: Number of classes, C.

    Returns:
        int64, shape (C, C): a row per true class, a column per predicted class.

    Raises:
        ValueError: A class is out of range.
    """
    labels = labels.to(predicted.device)
    for name, values, least in (("labels", labels, 0), ("predicted", predicted, -1)):
        outside = values[(values < least) | (values >= classes)]
        if len(outside):
            raise ValueError(
                f"`{name}` must be in [{least}, {classes - 1}] for {classes} classes, "
                f"got {outside[0].item()}"
            )
    cells = (labels * classes + predicted)[predicted >= 0]
    return torch.bincount(cells, minlength=classes**2).view(classes, classes)


def per_class_recall(confusion: Tensor, labels: Tensor) -> Tensor:
    """Share of each class's images that are classified rightly; their mean is the mean recall.

    Args:
        confusion: What `confusion_matrix` returned, shape (C, C).
        labels: The labels it was given, shape (N,): images without a prediction are in no row of
            the matrix, but they are wrong.

    Returns:
        float64, shape (C,); 0 for a class without images, as in the mean recall
        (docs/original.md, section 4).
    """
    counts = torch.bincount(labels.to(confusion.device), minlength=len(confusion))
    return confusion.diagonal().double() / counts.clamp(min=1)


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from the share that is right.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3: images fall into
    bins (lo, hi] of equal width by their confidence, and the error is
    sum_b (n_b / N) |accuracy_b - mean confidence_b|. A confidence of exactly 0, which `Evaluation`
    gives to images without a prediction, belongs to the first bin.

    Args:
        confidence: Probability of the predicted class, shape (N,), in [0, 1].
        correct: Whether that class is the true one, bool, shape (N,).
        bins: Number of bins, >= 1.

    Raises:
        ValueError: There are no images or no bins, or a confidence is not in [0, 1].
    """
    if bins < 1 or not len(confidence):
        raise ValueError(
            f"`bins` and the number of images must be >= 1, got {bins} and {len(confidence)}"
        )
    outside = confidence[~((confidence >= 0) & (confidence <= 1))]
    if len(outside):
        raise ValueError(f"`confidence` must be in [0, 1], got {outside[0].item()}")
    # In the type of the confidences: float32 0.2 is above float64 0.2 and would miss its bin.
    edges = torch.arange(1, bins, dtype=confidence.dtype, device=confidence.device) / bins
    excess = correct.double() - confidence.double()
    per_bin = torch.bincount(torch.bucketize(confidence, edges), excess, minlength=bins)
    return per_bin.abs().sum().item() / len(confidence)


def hyperspherical_energies(features: Tensor, block: int = 1024) -> tuple[float, float, float]:
    """Hyperspherical energies of a set of feature vectors for s = 0, 1 and 2, in that order.

    They say how evenly the directions spread over the sphere: lower is more diverse. Vectors are
    divided by sqrt(sum x^2 + 1e-4), and with d^2 = 2 - 2 cos the energies are the means over all
    pairs i < j of

        s = 0: -ln d^2        s = 1: 1 / d        s = 2: 1 / d^2

    Source: Liu et al. 2018, Learning towards Minimum Hyperspherical Energy, in the form of their
    released code (wy1iu/MHE), to which the authors of ASG refer. As there, s = 0 is *twice* the
    textbook's -ln d. Orthogonal vectors give -0.6931, 0.7071 and 0.5. So do all-zero vectors: with
    the 1e-4 under the root they look orthogonal to everything, each other included, and a network
    whose features died looks diverse. Vectors much shorter than 0.1 tend to the same.

    Every pair counts, in float64, in tiles of `block` x `block` pairs: beyond a float64 copy of
    the features memory does not grow with N. Time grows with N^2 D / 2.

    Args:
        features: Shape (N, D), N >= 2.
        block: Rows and columns of a tile; up to that many vectors are one tile.

    Returns:
        Energies for s = 0, 1 and 2, so that index s is the energy of that s; all NaN where a
        feature is not finite. Pairs closer than `LEAST_SQUARED_DISTANCE` count as that far apart,
        so that collapsed features give large, finite energies.

    Raises:
        ValueError: The features are not a matrix of at least two rows.
    """
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(
            f"`features` must have shape (N, D) with N >= 2, got {tuple(features.shape)}"
        )
    if not features.isfinite().all():
        return (float("nan"),) * 3
    rows = features.double()
    rows = rows / (rows.square().sum(dim=1, keepdim=True) + NORM_OFFSET).sqrt()
    tiles = rows.split(block)
    total = rows.new_zeros(3)
    for first, left in enumerate(tiles):
        for second, right in enumerate(tiles[first:], start=first):
            squared = 2 - 2 * (left @ right.T)
            if second == first:
                above = torch.triu_indices(len(left), len(left), 1, device=rows.device)
                squared = squared[above[0], above[1]]
            squared.clamp_(min=LEAST_SQUARED_DISTANCE)
            inverse = squared.rsqrt()
            total += torch.stack((-squared.log().sum(), inverse.sum(), inverse.square().sum()))
    pairs = len(rows) * (len(rows) - 1) // 2
    zero, one, two = (total / pairs).tolist()
    return zero, one, two
